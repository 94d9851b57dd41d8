"""What people ask of a joint embedding; empty until its issue asks."""
