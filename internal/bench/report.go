package bench

import (
	"encoding/json"
	"fmt"
	"html"
	"io"
	"math"
	"strings"
	"text/tabwriter"
)

// WriteText writes the tables for people.
func (r *Report) WriteText(w io.Writer) error {
	out := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(out, "%s, %s, commit %s, %s. Medians of %d rounds in which the peers took turns, [least–most]; ×R is sheaf's time as a multiple of that row's, the median over the rounds.\n",
		r.Machine, r.Go, r.Commit, r.When, r.Rounds)
	for _, t := range r.Tables {
		fmt.Fprintf(out, "\n%s; %s\n", t.Title, t.Unit)
		fmt.Fprintf(out, "\t%s\n", strings.Join(t.Columns, "\t"))
		for _, row := range t.Rows {
			fmt.Fprint(out, row.Name)
			for _, c := range row.Cells {
				fmt.Fprint(out, "\t", c)
			}
			fmt.Fprintln(out)
		}
		for _, n := range t.Notes {
			fmt.Fprintln(out, n)
		}
	}
	return out.Flush()
}

// String is the cell as text.
func (c Cell) String() string {
	s := digits(c.Median)
	if c.Min != c.Max {
		s += fmt.Sprintf(" [%s–%s]", digits(c.Min), digits(c.Max))
	}
	if c.Ratio > 0 {
		s += fmt.Sprintf(" ×%.2f", c.Ratio)
	}
	if c.CPU > 0 {
		s += fmt.Sprintf(" (cpu %s)", digits(c.CPU))
	}
	return s
}

// digits writes three digits of a number that count.
func digits(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.*f", max(0, 2-int(math.Floor(math.Log10(v)))), v)
}

// WriteMarkdown writes the tables as a page.
func (r *Report) WriteMarkdown(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Performance\n\nWritten by `sheaf bench --markdown docs/PERFORMANCE.md`; do not edit.\n\n%s, %s, commit %s, %s.\n\n", r.Machine, r.Go, r.Commit, r.When)
	fmt.Fprintf(&b, "Medians of %d rounds in which the peers took turns, between the least and the most. ×R is sheaf's time as a multiple of that row's,\n"+
		"the median over the rounds: below 1, sheaf is faster. cpu is the processor time of all processes together, which a busy machine changes\n"+
		"less than it does the time.\n", r.Rounds)
	for _, t := range r.Tables {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n| |", t.Title, t.Unit)
		for _, c := range t.Columns {
			fmt.Fprintf(&b, " %s |", c)
		}
		b.WriteString("\n|---|" + strings.Repeat("---|", len(t.Columns)) + "\n")
		for _, row := range t.Rows {
			fmt.Fprintf(&b, "| %s |", row.Name)
			for _, c := range row.Cells {
				fmt.Fprintf(&b, " %s |", c)
			}
			b.WriteString("\n")
		}
		if len(t.Notes) > 0 {
			b.WriteString("\n")
		}
		for _, n := range t.Notes {
			fmt.Fprintf(&b, "- %s\n", n)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// WriteJSON writes the report for programs.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteHTML writes a page with the plot of the cold times, which is the
// thesis's Figure 17 with our line, and the tables.
func (r *Report) WriteHTML(w io.Writer) error {
	var b strings.Builder
	b.WriteString("<!doctype html><meta charset=utf-8><title>sheaf: performance</title>\n" +
		"<style>body{font:14px sans-serif;max-width:60em;margin:2em auto}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:2px 8px;text-align:left}</style>\n")
	fmt.Fprintf(&b, "<h1>Performance</h1><p>%s, %s, commit %s, %s.</p>\n", html.EscapeString(r.Machine), html.EscapeString(r.Go), html.EscapeString(r.Commit), r.When)
	for _, t := range r.Tables {
		fmt.Fprintf(&b, "<h2>%s</h2><p>%s</p>\n", html.EscapeString(t.Title), html.EscapeString(t.Unit))
		if t.Name == "cold" || t.Name == "latency" || t.Name == "growth-workers" {
			b.WriteString(t.plot())
		}
		b.WriteString("<table><tr><th>")
		for _, c := range t.Columns {
			fmt.Fprintf(&b, "<th>%s", html.EscapeString(c))
		}
		for _, row := range t.Rows {
			fmt.Fprintf(&b, "\n<tr><td>%s", html.EscapeString(row.Name))
			for _, c := range row.Cells {
				fmt.Fprintf(&b, "<td>%s", html.EscapeString(c.String()))
			}
		}
		b.WriteString("</table>\n")
		for _, n := range t.Notes {
			fmt.Fprintf(&b, "<p>%s</p>\n", html.EscapeString(n))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// plot draws a table's rows as lines over its columns, by the logarithm.
func (t Table) plot() string {
	const width, height, left, bottom = 760, 380, 60, 30
	least, most := math.Inf(1), 0.0
	for _, row := range t.Rows {
		for _, c := range row.Cells {
			if c.Median > 0 {
				least, most = min(least, c.Median), max(most, c.Median)
			}
		}
	}
	lo, hi := math.Floor(math.Log10(least)), math.Ceil(math.Log10(most))
	hi = max(hi, lo+1)
	x := func(i int) float64 {
		return left + float64(i)*(width-left-220)/float64(max(1, len(t.Columns)-1))
	}
	y := func(v float64) float64 {
		return 10 + (height-bottom-10)*(hi-math.Log10(v))/(hi-lo)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" font-size=\"11\">\n", width, height)
	for e := lo; e <= hi; e++ {
		v := math.Pow(10, e)
		fmt.Fprintf(&b, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/><text x=\"4\" y=\"%.1f\">%s</text>\n", left, width-220, y(v), y(v), y(v)+4, digits(v))
	}
	for i, c := range t.Columns {
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", x(i), height-8, html.EscapeString(c))
	}
	colors := []string{"#c00", "#06c", "#093", "#960", "#609", "#e70", "#088"}
	for k, row := range t.Rows {
		color := colors[k%len(colors)]
		var points []string
		for i, c := range row.Cells {
			if c.Median > 0 {
				points = append(points, fmt.Sprintf("%.1f,%.1f", x(i), y(c.Median)))
				fmt.Fprintf(&b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x(i), y(c.Median), color)
			}
		}
		fmt.Fprintf(&b, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"%s\"/>\n", color, strings.Join(points, " "))
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" fill=\"%s\">%s</text>\n", width-212, 20+16*k, color, html.EscapeString(row.Name))
	}
	b.WriteString("</svg>\n")
	return b.String()
}
