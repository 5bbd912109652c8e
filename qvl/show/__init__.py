"""Pictures and pages for people: marks on pictures, contact sheets, heat maps, plots, one HTML shell."""
