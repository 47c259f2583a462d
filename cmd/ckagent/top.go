package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/agent/signals/metrics"
	"github.com/ckagent/ckagent/agent/store"
)

type topOptions struct {
	interval, every, gap, goal time.Duration
	count                      int
	share                      float64
	match, metrics, store, qmp string
}

func newTopCommand(a *app) *cobra.Command {
	var o topOptions
	c := &cobra.Command{
		Use: "top [QEMU-PID...]", Short: "Watch running VMs: dirty rate, vCPUs, network, disks",
		Long: "Watch running VMs, all of this host or those named: dirty rate, working set, vCPUs, network with\n" +
			"idle slots, disk writes, and whether they are protected. With --json one object a line.\n" +
			"Dirty rates are sampled now and then; a VM's memory is free for checkpoints in between.",
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, args []string) error { return runTop(c.Context(), a, &o, args) },
	}
	f := c.Flags()
	f.DurationVar(&o.interval, "interval", time.Second, "time between two looks")
	f.DurationVar(&o.every, "dirty-every", 10*time.Second, "time between two dirty-rate windows of a VM (0: none)")
	f.DurationVar(&o.gap, "gap", time.Millisecond, "silence that makes an idle slot of the network")
	f.IntVar(&o.count, "count", 0, "end after so many looks (0: go on)")
	f.Float64Var(&o.share, "max-share", 0.25, "share of memory a dirty-rate window arms at most")
	f.StringVar(&o.match, "match", "", "watch only VMs whose name matches this pattern ('web-*')")
	f.StringVar(&o.metrics, "metrics", "", "serve Prometheus metrics at this loopback address (127.0.0.1:9464)")
	f.DurationVar(&o.goal, "goal", 15*time.Minute, "with --metrics: time between checkpoints that is aimed at")
	f.StringVar(&o.qmp, "qmp", "", "address of the QMP monitor of the one VM named (default: found from the process)")
	storeFlag(c, &o.store)
	return c
}

func (o *topOptions) check(pids []int) error {
	switch {
	case o.interval < 50*time.Millisecond || o.interval > time.Hour:
		return usageError("--interval %v: want 50ms to 1h", o.interval)
	case o.every != 0 && o.every < time.Second:
		return usageError("--dirty-every %v: want 0 or at least 1s", o.every)
	case o.gap < 50*time.Microsecond || o.gap > time.Minute:
		return usageError("--gap %v: want 50us to 1m", o.gap)
	case o.share <= 0 || o.share > 1:
		return usageError("--max-share %v: want above 0 to 1", o.share)
	case o.count < 0:
		return usageError("--count %d: want 0 or more", o.count)
	case o.match != "" && len(pids) > 0:
		return usageError("--match and pids together make no sense")
	case !validPattern(o.match):
		return usageError("--match %q: no pattern", o.match)
	case o.qmp != "" && len(pids) != 1:
		return usageError("--qmp is one VM's: name that VM")
	}
	return nil
}

func validPattern(p string) bool {
	_, err := path.Match(p, "")
	return err == nil
}

func runTop(ctx context.Context, a *app, o *topOptions, args []string) (err error) {
	var pids []int
	for _, arg := range args {
		pid, err := parsePID(arg)
		if err != nil {
			return err
		}
		pids = append(pids, pid)
	}
	if err := o.check(pids); err != nil {
		return err
	}
	if len(pids) == 0 && o.match == "" && o.metrics == "" {
		if d, derr := a.daemon(ctx); derr == nil {
			return errors.Join(o.ofDaemon(ctx, a, d), d.conn.Close())
		} else if a.asked() != "" {
			return derr
		}
	}
	w := signals.NewWatcher(ctx, signals.WatchOptions{PIDs: pids, Match: o.match, QMP: o.qmp, Take: takeUserfaultfd, Gap: o.gap, DirtyEvery: o.every, MaxShare: o.share})
	defer func() { err = errors.Join(err, w.Close()) }()
	if o.metrics != "" {
		stop, err := o.serve(ctx, w)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	t := topView{a: a, screen: newScreen(a.out)}
	tick := time.NewTicker(o.interval)
	defer tick.Stop()
	for n := 1; ; n++ {
		s, err := w.Look(ctx)
		if err != nil && len(pids) > 0 {
			return err
		}
		if err != nil {
			a.log.Warn("a VM could not be read", "error", err)
		}
		t.show(s)
		if n == o.count {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil // the way to end it
		case <-tick.C:
		}
	}
}

// ofDaemon shows what a daemon sees.
func (o *topOptions) ofDaemon(ctx context.Context, a *app, d *protector) error {
	stream, err := d.Top(ctx, &apipb.TopRequest{IntervalNs: int64(o.interval), Count: uint32(o.count)})
	if err != nil {
		return api.FromStatus("top", err)
	}
	t := topView{a: a, screen: newScreen(a.out)}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) || ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return api.FromStatus("top", err)
		}
		var s signals.Snapshot
		if err := json.Unmarshal([]byte(r.GetSnapshot()), &s); err != nil {
			return problem.New(problem.Failed, "top", "", "%w", err)
		}
		t.show(s)
	}
}

// serve answers scrapes until stop is called.
func (o *topOptions) serve(ctx context.Context, w *signals.Watcher) (stop func() error, err error) {
	st, err := store.Open(o.store)
	if problem.Is(err, problem.NotFound) {
		st, err = nil, nil // no checkpoint yet: no series about them
	}
	if err != nil {
		return nil, err
	}
	l, err := metrics.Listen(o.metrics)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		ended <- metrics.Serve(ctx, l, metrics.New(metrics.Source{Snapshot: w.Last, Store: st, Goal: o.goal}))
	}()
	return func() error {
		cancel()
		return <-ended
	}, nil
}

// topView shows snapshots: on a terminal in place, else one after another.
type topView struct {
	a      *app
	screen *screen // nil: not a terminal
	lacked bool
}

// topResult is a snapshot as one line of JSON.
type topResult struct {
	Schema string `json:"schema"`
	signals.Snapshot
}

func (t *topView) show(s signals.Snapshot) {
	if t.a.json {
		t.a.print("top", topResult{schema("top"), s})
		return
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %s", s.Time.Format("15:04:05"), plural(len(s.VMs), "VM"))
	if t.screen != nil {
		b.WriteString("  (control-C ends)")
	}
	b.WriteString("\n")
	var rows [][]string
	for i := range s.VMs {
		rows = append(rows, topRow(&s.VMs[i]))
	}
	t.tables(&b, rows)
	for _, l := range s.Missing {
		if t.screen != nil || !t.lacked {
			fmt.Fprintf(&b, "missing %s: %s; instead: %s\n", l.Program, l.Reason, l.Instead)
		}
	}
	t.lacked = true
	for _, x := range s.VMs {
		if x.DirtyNote != "" {
			fmt.Fprintf(&b, "%s: %s\n", dash(x.VM), oneLine(x.DirtyNote))
		}
		for _, n := range x.Notes {
			fmt.Fprintf(&b, "%s: %s\n", dash(x.VM), oneLine(n))
		}
	}
	if t.screen != nil {
		t.screen.show(b.String())
		return
	}
	fmt.Fprint(t.a.out, b.String())
}

// The columns: who, memory and vCPUs, network and disks.
var topHeader = []string{"VM", "PID", "STATE", "DIRTY/S", "+-", "WSS", "CPU", "WAIT", "IDLE", "NET IN/S", "OUT/S", "REQ/S", "SLOTS/S", "WRITE/S", "OPS/S"}

const (
	topWho    = 2 // columns that name the VM
	topMemory = 9 // columns up to the network
)

// tables puts everything side by side, or below each other where the terminal is too
// narrow for that.
func (t *topView) tables(b *strings.Builder, rows [][]string) {
	var wide strings.Builder
	writeTable(&wide, topHeader, rows)
	if t.screen != nil {
		columns, _ := t.screen.size()
		for line := range strings.Lines(wide.String()) {
			if len([]rune(strings.TrimRight(line, "\n"))) > columns {
				part := func(from, to int) {
					cells := func(row []string) []string {
						return append(append([]string{}, row[:topWho]...), row[from:to]...)
					}
					var some [][]string
					for _, r := range rows {
						some = append(some, cells(r))
					}
					writeTable(b, cells(topHeader), some)
				}
				part(topWho, topMemory)
				b.WriteString("\n")
				part(topMemory, len(topHeader))
				return
			}
		}
	}
	b.WriteString(wide.String())
}

// plural is a number of things.
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func topRow(x *signals.Sample) []string {
	r := []string{dash(x.VM), fmt.Sprint(x.PID), x.State, "-", "-", "-", "-", "-", "-", "-", "-", "-", "-", "-", "-"}
	if d := x.Dirty; d != nil {
		r[3], r[4], r[5] = fmt.Sprintf("%.0f", d.Rate), fmt.Sprintf("%.0f", d.Error), sizeText(d.WSSBytes)
	}
	if v := x.VCPU; v != nil {
		r[6], r[7] = percent(v.RunShare), percent(v.WaitShare)
		if v.HasSlots {
			r[8] = percent(v.IdleShare)
		}
	}
	if len(x.Network) > 0 {
		var in, out, requests, slots float64
		estimate := false
		for _, n := range x.Network {
			in, out, requests, slots = in+n.InRate, out+n.OutRate, requests+n.RequestRate, slots+n.SlotsRate
			estimate = estimate || n.Estimate
		}
		r[9], r[10], r[11], r[12] = sizeText(uint64(in)), sizeText(uint64(out)), fmt.Sprintf("%.0f", requests), fmt.Sprintf("%.0f", slots)
		if estimate {
			r[9], r[10], r[11] = "~"+r[9], "~"+r[10], "-"
		}
	}
	if d := x.Disk; d != nil {
		r[13], r[14] = sizeText(uint64(d.Rate)), fmt.Sprintf("%.0f", d.Ops)
		if d.Estimate {
			r[13] = "~" + r[13]
		}
	}
	return r
}

func percent(x float64) string { return strings.TrimSpace(fmt.Sprintf("%5.1f %%", 100*x)) }
