package torture

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
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
	var missed []string
	c.Record = func(o Outcome) {
		if !o.Acted && o.Victim != Nobody {
			missed = append(missed, o.Round.String())
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
	if len(missed) > 2 {
		t.Errorf("%d instants did not come: %v", len(missed), missed)
	}
	if c.Done() < len(SmallRounds()) {
		t.Errorf("only %d rounds", c.Done())
	}
}
