"""Reader of LVIS- and COCO-style annotation files: JSON into flat columns, checked once for all uses."""
