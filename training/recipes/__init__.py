"""Ways of learning together: what is played, by whom, which policies learn how, and the claim that it is held to."""
