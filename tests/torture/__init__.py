"""What the product must survive: `just torture` (`run`) kills, corrupts, fills disks and feeds garbage."""
