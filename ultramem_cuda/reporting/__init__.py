"""What the HTML reports share: the page, its charts, and how numbers are written."""
