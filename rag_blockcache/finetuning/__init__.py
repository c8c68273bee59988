"""Block fine-tuning: data, mask and training (not part of this release)."""
