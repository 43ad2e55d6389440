"""Mask R-CNN with MMDetection's numerics: backbone, RPN, RoI heads, mask head, and how they are built."""
