package torture

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// command runs a program to its end and returns what it says on its output.
func command(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	mine.add(pid)
	defer mine.drop(pid)
	if err := cmd.Wait(); err != nil {
		return out.Bytes(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, errs.Bytes())
	}
	return out.Bytes(), nil
}

// exhaustive are tests elsewhere that go through every instant of something, and
// what of their log is their figure.
var exhaustive = []struct {
	what, pkg, run string
	figure         *regexp.Regexp
	sum            bool // the figure is a number to add up
}{
	{"power loss at each of the store's operations, with unsynced ones lost or reordered", "github.com/ckagent/ckagent/agent/store", "^TestPowerLoss$",
		regexp.MustCompile(`(\d+ operations, \d+ states, \d+ failures)`), false},
	{"tracer killed at every stop of an injection: stops survived by the target", "github.com/ckagent/ckagent/agent/vm/inject", "^TestTracerDiesAtEveryStop$",
		regexp.MustCompile(`(\d+) stops survived`), true},
	{"pager deaths and freezes, page by page", "github.com/ckagent/ckagent/restore/pager", "^TestSurvivesDeathsAndFreezes$",
		regexp.MustCompile(`(?m)^(ok|--- PASS: TestSurvivesDeathsAndFreezes)`), false},
}

// Tests runs them and counts.
func (c *Campaign) Tests(ctx context.Context) error {
	for _, e := range exhaustive {
		o := &Outcome{Round: Round{Kind: "test", Victim: Nobody, Action: None, Step: e.what}}
		began := time.Now()
		out, err := command(ctx, "go", "test", "-count=1", "-v", "-run", e.run, e.pkg)
		o.Took = time.Since(began)
		found := e.figure.FindAllSubmatch(out, -1)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			o.fail("%v", err)
			o.Log = string(out[:min(len(out), 4096)])
		case len(found) == 0:
			o.fail("its log has no figure")
		case e.sum:
			sum := 0
			for _, m := range found {
				var n int
				_, _ = fmt.Sscan(string(m[1]), &n) // the expression lets only digits through
				sum += n
			}
			o.Log = fmt.Sprint(sum)
		default:
			o.Log = string(found[0][1])
		}
		c.note(o)
		fmt.Fprintf(os.Stderr, "%s: %s\n", e.what, o.Log)
	}
	return nil
}
