package bench

import (
	"fmt"
	"strings"

	"github.com/ckagent/ckagent/tools/bench/report"
)

// stageTable collects the stages of an operation over rounds.
type stageTable struct {
	title        string
	first, later report.Figures
}

func (t *stageTable) add(round int, stages []stage) {
	into := &t.later
	if round == 0 {
		into = &t.first
	}
	for _, s := range stages {
		into.Add(s.name, s.ns)
	}
}

// profileMarkdown prints what each stage costs.
func profileMarkdown(tables []stageTable) string {
	var b strings.Builder
	for _, t := range tables {
		names := t.later.Names()
		if len(names) == 0 {
			names = t.first.Names()
		}
		fmt.Fprintf(&b, "\n### %s\n\n| stage | first | later, median | later, largest |\n|---|---:|---:|---:|\n", t.title)
		for _, n := range names {
			ns := report.Nanoseconds
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", n, ns.Text(t.first.Get(n).Median()), ns.Text(t.later.Get(n).Median()), ns.Text(t.later.Get(n).Max()))
		}
	}
	return b.String()
}
