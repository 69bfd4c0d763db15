"""What a damaged queue file still holds, and how it is saved."""
