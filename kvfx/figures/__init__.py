"""Pictures of results, one per file: `data(...)` says what is drawn, `draw(data)` draws it;
`kvfx report` puts them on a page.
"""
