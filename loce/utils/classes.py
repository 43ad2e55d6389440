"""Label convention, and statistics of the classes of a training set.

Labels: foreground classes are 0..C-1 in the order of the annotation file's `categories` list, background is C (the
paper's C+1, Sec. 3.1). A row that takes no part in any loss carries `IGNORED`. C is read from the data, never typed in.
"""

from dataclasses import dataclass

import numpy as np

IGNORED = -100  # torch.nn.functional.cross_entropy's own ignore_index
META = -2  # in place of the class that an image was drawn for: the image is of the meta batch (BALMS)
GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent"}  # by LVIS's letters
GROUPS = tuple(GROUP_NAMES)
GROUP_RGB = {"r": (209, 73, 91), "c": (237, 174, 73), "f": (48, 99, 142)}  # in every picture


@dataclass(frozen=True, kw_only=True)
class ClassStats:
    """Per-class facts of a training set; arrays are indexed by label 0..C-1.

    names: C strings; category_ids: (C,) int64, the file's own ids, gaps allowed; image_counts, instance_counts: (C,)
    int64 over the training set; groups: (C,) array of "r", "c" or "f"; image_total: training images with objects;
    file_images: all images of the training file, 0 where that is not known.
    """

    names: tuple[str, ...]
    category_ids: np.ndarray
    image_counts: np.ndarray
    instance_counts: np.ndarray
    groups: np.ndarray
    image_total: int
    file_images: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def group_mask(self, group: str) -> np.ndarray:
        """(C,) bool, true for the classes of group "r", "c" or "f"."""
        return self.groups == group


def frequency_groups(image_counts: np.ndarray, rare_max: int = 10, common_max: int = 100) -> np.ndarray:
    """LVIS's groups from image counts (C,): "r" up to `rare_max` images, "c" up to `common_max`, else "f"."""
    groups = np.where(image_counts <= rare_max, "r", np.where(image_counts <= common_max, "c", "f"))
    return groups.astype("<U1")
