"""AlignProp: reward gradients through the last denoising steps."""
