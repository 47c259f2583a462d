package oldkernel

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/doctor"
	"github.com/ckagent/ckagent/tools/bench/report"
)

var update = flag.Bool("update", false, "write the table of docs/kernels.md")

const (
	page               = "../../docs/kernels.md"
	pageBegin, pageEnd = "<!-- made by tools/oldkernel: do not edit -->", "<!-- end -->"
)

// note adds a line to the table of what this kernel does.
func (m *machine) note(what, result, says string) {
	cell := func(s string) string {
		return strings.ReplaceAll(strings.Join(strings.Fields(s), " "), "|", `\|`)
	}
	m.table = append(m.table, fmt.Sprintf("| %s | %s | %s |", cell(what), cell(result), cell(says)))
}

// noteGaps adds what doctor says is missing.
func (m *machine) noteGaps(r *doctor.Report) {
	for _, c := range r.Gaps() {
		if c.Group == "kernel" || c.Group == "bpf" {
			m.note(c.Name, "missing", c.Costs)
		}
	}
	for _, e := range r.Engines {
		m.note("RAM: "+e.RAM, "modes "+strings.Join(e.Modes, ", "), e.Reason)
	}
}

// comparePage holds the table against the one in the documentation, or writes it.
func (m *machine) comparePage() {
	m.t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		m.t.Fatal(err)
	}
	body := "| what | Linux 6.1 | so |\n|---|---|---|\n" + strings.Join(m.table, "\n")
	want, err := report.Splice(string(text), pageBegin, pageEnd, body)
	if err != nil {
		m.t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			m.t.Fatal(err)
		}
	} else if d := cmp.Diff(want, string(text)); d != "" {
		m.t.Errorf("%s is not what is seen (-seen +page); go test ./tools/oldkernel -args -update\n%s", page, d)
	}
}
