package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/replay"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

type replayOptions struct {
	policies []string
	params   []string
	mtbf     time.Duration
	fixed    time.Duration
	perPage  time.Duration
	speed    float64
	scan     float64
	repeat   int
	list     bool
}

func newPolicyReplayCommand(a *app, dir *string) *cobra.Command {
	var o replayOptions
	c := &cobra.Command{
		Use: "replay TRACE --policy NAME...", Short: "Run policies over a recorded trace of signals and compare them",
		Long: "Run policies over a recorded trace of signals (JSON lines) and say what each would have done, what that\n" +
			"would have cost, and how the best fixed interval compares. A policy that is not installed is run in this\n" +
			"process if it is one of those that come with ckagent.",
		Args: exactArgs(1, "a file with a trace"),
		RunE: func(c *cobra.Command, args []string) error { return runPolicyReplay(c, a, *dir, &o, args[0]) },
	}
	f := c.Flags()
	f.StringArrayVar(&o.policies, "policy", nil, "policy to run; may be repeated (default: "+shipped.Default+")")
	paramFlag(c, &o.params)
	f.DurationVar(&o.mtbf, "mtbf", 0, "mean time between failures (default: the trace's)")
	f.DurationVar(&o.fixed, "cost", replay.DefaultModel.Fixed, "what a checkpoint takes of the guest's time whatever is written; this and the next three where the trace tells of no checkpoints")
	f.DurationVar(&o.perPage, "cost-per-page", replay.DefaultModel.PerPage, "more for each page written first while it is taken")
	f.Float64Var(&o.speed, "store-speed", replay.DefaultModel.StoreBytesPerSecond, "bytes a checkpoint is written at per second, where the trace does not say")
	f.Float64Var(&o.scan, "scan-share", 1, "share of a checkpoint's duration in which it passes over memory")
	f.IntVar(&o.repeat, "repeat", 1, "go through the trace so many times: a guest that goes on as it did")
	f.BoolVar(&o.list, "checkpoints", false, "list the checkpoints as well")
	return c
}

const maxRepeat = 1000

type replayedCheckpoint struct {
	AtNS    int64  `json:"at_ns"`
	TotalNS int64  `json:"total_ns"`
	LostNS  int64  `json:"lost_ns"`
	Bytes   uint64 `json:"stored_bytes"`
	Mode    string `json:"mode"`
	Reason  string `json:"reason"`
}

type replayView struct {
	Policy      string               `json:"policy"`
	SHA256      string               `json:"sha256"` // empty: in this process
	DurationNS  int64                `json:"duration_ns"`
	Count       int                  `json:"checkpoints"`
	Decisions   int                  `json:"decisions"`
	StoredBytes uint64               `json:"stored_bytes"`
	Overhead    float64              `json:"overhead_share"`
	Exposure    float64              `json:"expected_loss_share"`
	Cost        float64              `json:"cost_share"`
	MeanLossNS  int64                `json:"mean_loss_ns"`
	MaxLossNS   int64                `json:"max_loss_ns"`
	Taken       []replayedCheckpoint `json:"taken,omitempty"`
}

func runPolicyReplay(c *cobra.Command, a *app, dir string, o *replayOptions, path string) error {
	params, err := parseParams(o.params)
	if err != nil {
		return err
	}
	if o.mtbf < 0 || o.fixed < 0 || o.perPage < 0 {
		return usageError("--mtbf, --cost and --cost-per-page are not negative")
	}
	if !(o.scan > 0 && o.scan <= 1) {
		return usageError("--scan-share %v: want above 0 to 1", o.scan)
	}
	if !(o.speed > 0) || o.repeat < 1 || o.repeat > maxRepeat {
		return usageError("--store-speed wants more than 0, --repeat 1 to %d", maxRepeat)
	}
	trace, err := readTrace(path)
	if err != nil {
		return err
	}
	trace = replay.Repeat(trace, o.repeat)
	m := replay.Model{Fixed: o.fixed, PerPage: o.perPage, StoreBytesPerSecond: o.speed, ScanShare: o.scan}
	if o.mtbf > 0 {
		m.FailuresPerSecond = 1 / o.mtbf.Seconds()
	}
	if len(o.policies) == 0 {
		o.policies = []string{shipped.Default}
	}
	var views []replayView
	for _, name := range o.policies {
		v, err := replayOne(c.Context(), a, dir, name, params, trace, m)
		if err != nil {
			return err
		}
		views = append(views, v)
	}
	best, interval, err := replay.BestFixed(c.Context(), trace, m, time.Second, 24*time.Hour)
	if err != nil {
		return replayError(path, err)
	}
	printReplay(a, o, views, viewReplay(fmt.Sprintf("fixed %s, the best", interval.Round(time.Second)), "", best))
	return nil
}

func readTrace(path string) ([]*policy.Signals, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, problem.New(problem.NotFound, "read trace", path, "%w", err)
	}
	defer f.Close()
	trace, err := replay.Read(f)
	if err != nil {
		return nil, replayError(path, err)
	}
	return trace, nil
}

func replayError(what string, err error) error {
	code := problem.CodeOf(err)
	if errors.Is(err, replay.ErrTrace) {
		code = problem.Integrity
	}
	return problem.New(code, "replay", what, "%w", err)
}

// replayOne runs an installed policy as the host would, or one of ours in this process.
func replayOne(ctx context.Context, a *app, dir, name string, params map[string]string, trace []*policy.Signals, m replay.Model) (v replayView, err error) {
	p, err := plugins.NewRegistry(dir).Lookup(name)
	if create, ours := shipped.All[name]; ours && problem.Is(err, problem.NotFound) {
		made, err := create(params)
		if err != nil {
			return v, usageError("policy %s: %w", name, err)
		}
		res, err := replay.Run(ctx, trace, replay.InProcess{Policy: made}, m)
		if err != nil {
			return v, replayError(name, err)
		}
		return viewReplay(name, "", res), nil
	}
	if err != nil {
		return v, err
	}
	g, err := policyHost(a).Start(ctx, p, params)
	if errors.Is(err, plugins.ErrParams) {
		return v, usageError("policy %s: %w", name, err)
	}
	if err != nil {
		return v, replayError(name, err)
	}
	defer g.End()
	res, err := replay.Run(ctx, trace, g, m)
	if err != nil {
		return v, replayError(name, err)
	}
	return viewReplay(name, p.SHA256, res), nil
}

func viewReplay(name, sum string, r *replay.Result) replayView {
	v := replayView{Policy: name, SHA256: sum, DurationNS: r.DurationNS, Count: len(r.Checkpoints), Decisions: r.Decisions, StoredBytes: r.Bytes,
		Overhead: r.Overhead, Exposure: r.Exposure, Cost: r.Cost, MeanLossNS: r.MeanLossNS, MaxLossNS: r.MaxLossNS}
	for _, t := range r.Checkpoints {
		v.Taken = append(v.Taken, replayedCheckpoint(t))
	}
	return v
}

func printReplay(a *app, o *replayOptions, views []replayView, best replayView) {
	best.Taken = nil
	if !o.list {
		for i := range views {
			views[i].Taken = nil
		}
	}
	if a.json {
		a.print("replay", struct {
			Schema    string       `json:"schema"`
			Policies  []replayView `json:"policies"`
			BestFixed replayView   `json:"best_fixed"`
		}{schema("policy-replay"), views, best})
		return
	}
	var rows [][]string
	for _, v := range append(views, best) {
		rows = append(rows, []string{v.Policy, fmt.Sprint(v.Count), sizeText(v.StoredBytes), fmt.Sprintf("%.4f %%", 100*v.Overhead),
			fmt.Sprintf("%.4f %%", 100*v.Exposure), fmt.Sprintf("%.4f %%", 100*v.Cost), durationText(time.Duration(v.MeanLossNS)), durationText(time.Duration(v.MaxLossNS))})
	}
	a.table([]string{"POLICY", "CHECKPOINTS", "STORED", "OVERHEAD", "EXPECTED LOSS", "TOGETHER", "LOSS AT A FAILURE", "AT WORST"}, rows)
	for _, v := range views {
		for _, t := range v.Taken {
			fmt.Fprintf(a.out, "%s  %s  %-6s  %s\n", v.Policy, time.Unix(0, t.AtNS).UTC().Format(time.DateTime), dash(t.Mode), t.Reason)
		}
	}
}
