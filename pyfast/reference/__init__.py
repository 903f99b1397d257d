"""The truth of each op in plain torch: as short as the formula, on any device, in any floating dtype."""
