package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

type attachOptions struct {
	captureFlags
	interval  time.Duration
	once      bool
	policy    string
	policyDir string
	params    []string
}

func newAttachCommand(a *app) *cobra.Command {
	var o attachOptions
	c := &cobra.Command{
		Use: "attach QEMU-PID", Short: "Protect a running VM in the foreground", Args: exactArgs(1, "the pid of a QEMU process"),
		Long: "Protect a running VM in the foreground: take checkpoints when its policy wants them, until interrupted.\n" +
			"An interrupt at any moment leaves the VM running and untouched. Without --policy it is the policy auto\n" +
			"if that is installed, and with --interval alone a checkpoint at that interval.",
		RunE: func(c *cobra.Command, args []string) error { return runAttach(c, a, &o, args[0]) },
	}
	o.add(c)
	f := c.Flags()
	f.DurationVar(&o.interval, "interval", 15*time.Minute, "time between two checkpoints; with --policy, while that does not serve")
	f.BoolVar(&o.once, "once", false, "take one checkpoint and end")
	f.StringVar(&o.policy, "policy", "", "an installed policy, by name or path (default: "+shipped.Default+" where it is installed)")
	f.StringVar(&o.policyDir, "policy-dir", "", policyDirHelp)
	paramFlag(c, &o.params)
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
	if o.interval < agent.MinInterval {
		return usageError("--interval %v: want at least %v", o.interval, agent.MinInterval)
	}
	params, err := parseParams(o.params)
	if err != nil {
		return err
	}
	if len(params) > 0 && o.policy == "" {
		return usageError("--param is for --policy")
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
	registry := plugins.NewRegistry(o.policyDir)
	slot, err := plugins.NewSlot(plugins.SlotConfig{Registry: registry, Host: policyHost(a), Interval: o.interval,
		Changed: func(s plugins.Status) { a.policyChanged(s) }})
	if err != nil {
		return err
	}
	defer slot.Close()
	v, err := agent.Attach(c.Context(), pid, ao)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	p := agent.Protection{
		Slot: slot, KeepLast: o.keepLast, Capture: co,
		Taken:   func(r *capture.Result) { a.printCheckpoint(r) },
		Failed:  func(err error) { a.log.Error("checkpoint failed", "code", problem.CodeOf(err), "error", err) },
		Decided: a.decided,
	}
	if !c.Flags().Changed("compress") {
		p.Compressions = []string{"none", "s2", "zstd"}
	}
	protector := v.Protect(st, p)
	if name := o.wanted(c, registry); name != "" {
		if _, err := protector.SetPolicy(c.Context(), name, params); err != nil {
			return err
		}
	}
	a.log.Info("attached", "vm", v.Name, "qemu_pid", pid, "policy", slot.Status().Policy, "interval", o.interval)
	return a.protect(c.Context(), protector)
}

// wanted is the policy to begin with; empty: the built-in one.
func (o *attachOptions) wanted(c *cobra.Command, r *plugins.Registry) string {
	if o.policy != "" || c.Flags().Changed("interval") {
		return o.policy
	}
	if _, err := r.Lookup(shipped.Default); problem.Is(err, problem.NotFound) {
		return ""
	}
	return shipped.Default
}

// protect runs a protector with its control socket.
func (a *app) protect(ctx context.Context, p *agent.Protector) (err error) {
	path, err := api.SelfSocket(api.AttachDir)
	if err != nil {
		return err
	}
	l, err := api.Listen(path)
	if err != nil {
		return err
	}
	server := api.NewServer()
	apipb.RegisterAgentServer(server, agent.NewControl(func() []*agent.Protector { return []*agent.Protector{p} }))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	defer func() {
		// Whoever waits for our end hears of it; nobody else is waited for.
		late := time.AfterFunc(2*time.Second, server.Stop)
		server.GracefulStop()
		late.Stop()
		if serr := <-served; serr != nil {
			err = errors.Join(err, fmt.Errorf("control socket: %w", serr))
		}
	}()
	return p.Run(ctx)
}

func (a *app) policyChanged(s plugins.Status) {
	if s.Trouble != nil {
		a.log.Error("policy does not serve", "wanted", s.Wanted, "in_charge", s.Policy, "error", s.Trouble)
		return
	}
	a.log.Info("policy in charge", "policy", s.Policy, "generation", s.Generation, "path", s.Path, "sha256", s.SHA256, "params", paramText(s.Params))
}

func (a *app) decided(v plugins.Verdict) {
	a.log.Info("decision", "policy", v.Policy, "generation", v.Generation, "source", v.Source,
		"interval", time.Duration(v.Decision.GetIntervalNs()), "reason", v.Decision.GetReason())
}
