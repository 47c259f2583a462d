package devices

import (
	"fmt"
	"regexp"
	"strings"
)

// Row is one line of the table.
type Row struct {
	Device string // what a person calls it
	Args   string // what it is to QEMU
	Result string // works, works with a limit, refused
	Says   string // the limit, or the refusal as users see it
}

// cells that separate rows by their meaning.
const (
	Works   = "works"
	Limited = "works, with a limit"
	Refused = "refused"
)

// Line is the row as Markdown.
func (r Row) Line() string {
	cell := func(s string) string { return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`) }
	return fmt.Sprintf("| %s | `%s` | %s | %s |", cell(r.Device), cell(r.Args), r.Result, cell(r.Says))
}

// plain replaces what differs from run to run.
var plain = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`/(tmp|dev/shm)/[A-Za-z0-9._/-]*/`), ""},
	{regexp.MustCompile(`/dev/loop\d+`), "/dev/loopN"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "HOST:PORT"},
	{regexp.MustCompile(`\b(pid|process) \d+`), "$1 N"},
}

// Plain makes a message fit for the table.
func Plain(s string) string {
	for _, p := range plain {
		s = p.re.ReplaceAllString(s, p.to)
	}
	return s
}

// begin and end enclose the table in the page.
const (
	begin = "<!-- made by tools/devices: do not edit -->"
	end   = "<!-- end -->"
)

// Parse returns the rows' lines by device, from the page.
func Parse(page string) (map[string]string, error) {
	_, rest, ok := strings.Cut(page, begin)
	body, _, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return nil, fmt.Errorf("no table between %q and %q", begin, end)
	}
	out := map[string]string{}
	for line := range strings.Lines(body) {
		line = strings.TrimRight(line, "\n")
		if cells := strings.SplitN(line, "|", 3); len(cells) == 3 {
			out[strings.TrimSpace(cells[1])] = line
		}
	}
	return out, nil
}

// Replace puts the lines into the page.
func Replace(page string, lines []string) (string, error) {
	before, rest, ok := strings.Cut(page, begin)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return "", fmt.Errorf("no table between %q and %q", begin, end)
	}
	head := "\n| device | QEMU | result | what to know |\n|---|---|---|---|\n"
	return before + begin + head + strings.Join(lines, "\n") + "\n" + end + after, nil
}
