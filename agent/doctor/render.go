package doctor

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// WriteJSON writes the report as one JSON object.
func (r *Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

// WriteText writes the report for people: aligned, plain, no colours.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "ckagent doctor: %s (Linux %s, %s)\n", r.Status, r.Kernel, r.Arch)
	width := 0
	for _, c := range r.Checks {
		width = max(width, utf8.RuneCountInString(c.Name))
	}
	group := ""
	for _, c := range r.Checks {
		if c.Group != group {
			group = c.Group
			fmt.Fprintf(&b, "\n%s\n", group)
		}
		note := ""
		if !c.Required && c.Status != OK {
			note = " (optional)"
		}
		fmt.Fprintf(&b, "  %-7s  %-*s  %s%s\n", c.Status, width, c.Name, c.Detail, note)
		if c.Costs != "" {
			fmt.Fprintf(&b, "  %-7s  %-*s  costs: %s\n", "", width, "", c.Costs)
		}
		if c.Mend != "" {
			fmt.Fprintf(&b, "  %-7s  %-*s  mend:  %s\n", "", width, "", c.Mend)
		}
	}
	width = 0
	for _, e := range r.Engines {
		width = max(width, utf8.RuneCountInString(e.RAM))
	}
	b.WriteString("\nwhat a VM would get\n")
	for _, e := range r.Engines {
		modes := strings.Join(e.Modes, ", ")
		if modes == "" {
			modes = "refused"
		}
		fmt.Fprintf(&b, "  %-*s  engine %-4s  modes %-17s  %s\n", width, e.RAM, e.Engine, modes, e.Reason)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
