package torture

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// build makes what is harmed.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ckagent")
	out, err := exec.Command("go", "build", "-o", path, "github.com/ckagent/ckagent/cmd/ckagent").CombinedOutput()
	if err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return path
}

func campaign(t *testing.T) (*Campaign, *bytes.Buffer) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs guests, and time")
	}
	if os.Geteuid() != 0 {
		t.Fatal("needs root")
	}
	log := &bytes.Buffer{}
	dir, err := os.MkdirTemp("", "tort") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	c := &Campaign{Binary: build(t), Dir: dir, Log: log}
	if err := c.Open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		os.RemoveAll(dir)
		if t.Failed() || testing.Verbose() {
			t.Logf("\n%s", log)
		}
	})
	return c, log
}

// TestKillMatrix is the campaign in small: one round per kind of harm.
func TestKillMatrix(t *testing.T) {
	c, _ := campaign(t)
	var missed []Round
	c.Record = func(o Outcome) {
		if !o.Acted && o.Victim != Nobody {
			missed = append(missed, o.Round)
		}
		if len(o.Exceptions) > 0 {
			t.Errorf("%s: %v\n%s", o.Round, o.Exceptions, o.Log)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := c.Checkpoints(ctx, Sizes["256 MiB"], SmallRounds()); err != nil {
		t.Fatal(err)
	}
	// On a busy host a run may be over, or given up, before its instant comes.
	for try := 0; try < 3 && len(missed) > 0; try++ {
		again := missed
		missed = nil
		if err := c.Checkpoints(ctx, Sizes["256 MiB"], again); err != nil {
			t.Fatal(err)
		}
	}
	if len(missed) > 2 {
		t.Errorf("%d instants did not come: %v", len(missed), missed)
	}
	if c.Done() < len(SmallRounds()) {
		t.Errorf("only %d rounds", c.Done())
	}
}

// TestRestores harms lazy restores, one round per kind.
func TestRestores(t *testing.T) {
	c, _ := campaign(t)
	c.Record = func(o Outcome) {
		if len(o.Exceptions) > 0 {
			t.Errorf("%s: %v\n%s", o.Round, o.Exceptions, o.Log)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := c.Restores(ctx, SmallRestoreRounds()); err != nil {
		t.Fatal(err)
	}
	if c.Done() < len(SmallRestoreRounds()) {
		t.Errorf("only %d rounds", c.Done())
	}
}

// TestReportSums: what was recorded is what is reported, exceptions first of all.
func TestReportSums(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results")
	rec, err := NewRecorder(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []Outcome{
		{Round: Round{Kind: "pause", Victim: Agent, Action: Kill, Mode: "cow"}, Size: "256 MiB", Acted: true, InPause: true, Silence: 300 * time.Millisecond},
		{Round: Round{Kind: "random", Victim: Agent, Action: Kill, Mode: "cow"}, Size: "256 MiB", Acted: true, Silence: 100 * time.Millisecond, Exceptions: []string{"something is left"}},
		{Round: Round{Kind: "random", Victim: Agent, Action: Stop, Mode: "cow"}, Size: "256 MiB"},
		{Round: Round{Kind: "step", Victim: Guardian, Action: Kill, Mode: "cow", Step: "event STOP"}, Size: "8 GiB", Acted: true},
	} {
		if err := rec.Record(o); err != nil {
			t.Fatal(err)
		}
	}
	if err := rec.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := Report(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"**3 rounds with harm, 1 of them between STOP and RESUME; 2 at random instants, 1 of those between STOP and RESUME. Exceptions: 1.**",
		"1 instants did not come", "| agent, SIGKILL | 2 | 1 | 1 | 300 ms | 300 ms |", "something is left", "8 GiB, bound 1.24s",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
}
