package main

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

type attachOptions struct {
	captureFlags
	interval time.Duration
	once     bool
}

func newAttachCommand(a *app) *cobra.Command {
	var o attachOptions
	c := &cobra.Command{
		Use: "attach QEMU-PID", Short: "Protect a running VM in the foreground", Args: exactArgs(1, "the pid of a QEMU process"),
		Long: "Protect a running VM in the foreground: take checkpoints at an interval until interrupted.\n" +
			"An interrupt at any moment leaves the VM running and untouched.",
		RunE: func(c *cobra.Command, args []string) error { return runAttach(c, a, &o, args[0]) },
	}
	o.add(c)
	c.Flags().DurationVar(&o.interval, "interval", 15*time.Minute, "time between the beginnings of two checkpoints")
	c.Flags().BoolVar(&o.once, "once", false, "take one checkpoint and end")
	return c
}

func runAttach(c *cobra.Command, a *app, o *attachOptions, arg string) (err error) {
	if o.once {
		return runCheckpoint(c, a, &o.captureFlags, arg)
	}
	pid, err := parsePID(arg)
	if err != nil {
		return err
	}
	if o.interval < 100*time.Millisecond {
		return usageError("--interval %v: want at least 100ms", o.interval)
	}
	co, err := o.options(a)
	if err != nil {
		return err
	}
	ao, err := o.attach()
	if err != nil {
		return err
	}
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	v, err := agent.Attach(c.Context(), pid, ao)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	a.log.Info("attached", "vm", v.Name, "qemu_pid", pid, "interval", o.interval)
	return v.Protect(c.Context(), st, agent.Protection{
		Interval: o.interval, KeepLast: o.keepLast, Capture: co,
		Taken:  func(r *capture.Result) { a.printCheckpoint(r) },
		Failed: func(err error) { a.log.Error("checkpoint failed", "code", problem.CodeOf(err), "error", err) },
	})
}
