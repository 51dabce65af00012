"""What a run left in its folder, told to people: the campaign's report, and runs beside one another."""
