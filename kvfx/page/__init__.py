"""One HTML page that shows what the compiler did: `fast.save_html(path)`, `kvfx explain --html`."""
