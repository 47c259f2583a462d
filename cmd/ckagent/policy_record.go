package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

type recordOptions struct {
	duration, every, dirty time.Duration
	share                  float64
	qmp                    string
}

func newPolicyRecordCommand(a *app) *cobra.Command {
	var o recordOptions
	c := &cobra.Command{
		Use: "record QEMU-PID FILE", Short: "Record the signals of a running VM, for policy replay",
		Long: "Record the signals of a running VM that nobody protects just now, as policies are told of them: a line of\n" +
			"JSON each time. A FILE that ends in .gz is packed. An interrupt ends it early with what there is.",
		Args: exactArgs(2, "the pid of a QEMU process and a file to write"),
		RunE: func(c *cobra.Command, args []string) error {
			return runPolicyRecord(c.Context(), a, &o, args[0], args[1])
		},
	}
	f := c.Flags()
	f.DurationVar(&o.duration, "for", 5*time.Minute, "how long to record")
	f.DurationVar(&o.every, "every", 2*time.Second, "time between two lines")
	f.DurationVar(&o.dirty, "dirty-every", 2*time.Second, "time between two dirty-rate windows")
	f.Float64Var(&o.share, "max-share", 0.25, "share of memory a dirty-rate window arms at most")
	f.StringVar(&o.qmp, "qmp", "", "address of the QMP monitor (default: found from the process)")
	return c
}

func (o *recordOptions) check() error {
	switch {
	case o.every < 100*time.Millisecond || o.every > time.Hour:
		return usageError("--every %v: want 100ms to 1h", o.every)
	case o.duration < 2*o.every || o.duration > 30*24*time.Hour:
		return usageError("--for %v: want at least two lines (%v) and at most 30 days", o.duration, 2*o.every)
	case o.dirty < time.Second:
		return usageError("--dirty-every %v: want at least 1s", o.dirty)
	case o.share <= 0 || o.share > 1:
		return usageError("--max-share %v: want above 0 to 1", o.share)
	}
	return nil
}

func runPolicyRecord(ctx context.Context, a *app, o *recordOptions, arg, path string) (err error) {
	pid, err := parsePID(arg)
	if err != nil {
		return err
	}
	if err := o.check(); err != nil {
		return err
	}
	base, err := recorded(ctx, pid, o.qmp)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return problem.New(problem.Failed, "record signals", path, "%w", err)
	}
	t := newTraceWriter(f, strings.HasSuffix(path, ".gz"))
	began := time.Now()
	err = o.record(ctx, pid, base, t)
	if werr := t.Close(); werr != nil {
		err = errors.Join(err, problem.New(problem.Failed, "record signals", path, "%w", werr))
	}
	if err != nil && (ctx.Err() == nil || t.lines < 2) {
		return err
	}
	if a.json {
		a.print("recording", struct {
			Schema     string `json:"schema"`
			PID        int    `json:"qemu_pid"`
			VM         string `json:"vm"`
			Path       string `json:"path"`
			Lines      int    `json:"lines"`
			DurationNS int64  `json:"duration_ns"`
		}{schema("policy-record"), pid, base.GetVm().GetName(), path, t.lines, time.Since(began).Nanoseconds()})
		return nil
	}
	fmt.Fprintf(a.out, "%d lines of VM %s in %s\n", t.lines, dash(base.GetVm().GetName()), path)
	return nil
}

// recorded is what stays the same from line to line.
func recorded(ctx context.Context, pid int, qmp string) (s *policy.Signals, err error) {
	t, err := vm.Open(ctx, pid, vm.Options{QMP: qmp})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	p, err := vm.PredictPause(ctx, t)
	if err != nil {
		return nil, err
	}
	return &policy.Signals{
		Vm: &policypb.VM{Name: t.Name, RamBytes: p.TotalBytes, UsedBytes: p.UsedBytes, Vcpus: int32(len(t.VCPUs)), Accel: t.Accel},
		Capabilities: &policypb.Capabilities{Modes: []string{string(capture.Stop), string(capture.Buffer), string(capture.COW)},
			Engines: []string{string(capture.EngineUffd)}, Compressions: []string{"none"}, MinIntervalNs: int64(agent.MinInterval), Keep: agent.DefaultKeep},
	}, nil
}

// record writes lines until the time is over or the VM is.
func (o *recordOptions) record(ctx context.Context, pid int, base *policy.Signals, t *traceWriter) (err error) {
	w := signals.NewWatcher(ctx, signals.WatchOptions{PIDs: []int{pid}, QMP: o.qmp, Take: takeUserfaultfd, DirtyEvery: o.dirty, MaxShare: o.share})
	defer func() { err = errors.Join(err, w.Close()) }()
	tick := time.NewTicker(o.every)
	defer tick.Stop()
	end := time.NewTimer(o.duration)
	defer end.Stop()
	for {
		snap, err := w.Look(ctx)
		if err != nil {
			return err
		}
		for _, x := range snap.VMs {
			s := proto.CloneOf(base)
			s.NowNs = snap.Time.UnixNano()
			x.Tell(s)
			if err := t.write(s); err != nil {
				return problem.New(problem.Failed, "record signals", "", "%w", err)
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end.C:
			return nil
		case <-tick.C:
		}
	}
}

// traceWriter writes a trace, packed or not.
type traceWriter struct {
	f     *os.File
	pack  *gzip.Writer // nil: it is not packed
	out   *bufio.Writer
	lines int
}

func newTraceWriter(f *os.File, packed bool) *traceWriter {
	t := &traceWriter{f: f}
	var to io.Writer = f
	if packed {
		t.pack = gzip.NewWriter(f)
		to = t.pack
	}
	t.out = bufio.NewWriter(to)
	return t
}

func (t *traceWriter) write(s *policy.Signals) error {
	line, err := protojson.Marshal(s)
	if err != nil {
		return err
	}
	t.lines++
	_, err = t.out.Write(append(line, '\n'))
	return err
}

// Close writes out what is buffered.
func (t *traceWriter) Close() error {
	err := t.out.Flush()
	if t.pack != nil {
		err = errors.Join(err, t.pack.Close())
	}
	return errors.Join(err, t.f.Close())
}
