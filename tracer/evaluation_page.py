def evaluation_page(record): return ""
