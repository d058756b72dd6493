"""InternVLForConditionalGeneration for mm-engine."""
