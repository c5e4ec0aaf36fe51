"""From local gradients to sums on the ranks that own them, and who may change them there."""
