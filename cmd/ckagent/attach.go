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
	"github.com/ckagent/ckagent/agent/capture/proving"
	"github.com/ckagent/ckagent/agent/controller"
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

	foreground bool
	record     string
	onDeath    string
	rehearse   time.Duration
	track      bool
}

func newAttachCommand(a *app) *cobra.Command {
	var o attachOptions
	c := &cobra.Command{
		Use: "attach QEMU-PID", Short: "Protect a running VM", Args: exactArgs(1, "the pid of a QEMU process"),
		Long: "Protect a running VM: take checkpoints when its policy wants them. Where a daemon runs it does so, and the\n" +
			"command ends when the VM is protected; else, or with --foreground, the command does, until interrupted.\n" +
			"An interrupt at any moment leaves the VM running and untouched. Without --policy it is the policy auto\n" +
			"if that is installed, and with --interval alone a checkpoint at that interval.",
		RunE: func(c *cobra.Command, args []string) error { return runAttach(c, a, &o, args[0]) },
	}
	o.add(c)
	f := c.Flags()
	f.DurationVar(&o.interval, "interval", agent.DefaultInterval, "time between two checkpoints; with --policy, while that does not serve")
	f.BoolVar(&o.once, "once", false, "take one checkpoint and end")
	f.BoolVar(&o.foreground, "foreground", false, "protect it by this command even where a daemon runs")
	f.StringVar(&o.record, "record", "", "with --foreground, write a trace for policy replay: what the policy is told, each time it is asked")
	f.StringVar(&o.policy, "policy", "", "an installed policy, by name or path (default: "+shipped.Default+" where it is installed)")
	f.StringVar(&o.policyDir, "policy-dir", "", policyDirHelp)
	f.StringVar(&o.onDeath, "on-death", "", "when the VM crashes: notify (default), restore or none; restore needs the daemon")
	f.DurationVar(&o.rehearse, "rehearse-every", 0, "time between two test restores, by the daemon")
	f.BoolVar(&o.track, "track", false, "with engine bpf, know between checkpoints which pages are written: the next one reads only those; the guest pays with a fault for each page and with the huge pages it writes to")
	paramFlag(c, &o.params)
	return c
}

func runAttach(c *cobra.Command, a *app, o *attachOptions, arg string) error {
	if o.once {
		return runCheckpoint(c, a, &o.captureFlags, arg)
	}
	pid, err := parsePID(arg)
	if err != nil {
		return err
	}
	params, err := parseParams(o.params)
	if err != nil {
		return err
	}
	s := o.spec(c)
	s.Policy, s.Params, s.OnDeath, s.RehearseEveryNs = o.policy, params, o.onDeath, int64(o.rehearse)
	s.Track = o.track
	if c.Flags().Changed("interval") {
		if o.interval == 0 {
			return usageError("--interval 0: want at least %v", agent.MinInterval)
		}
		s.IntervalNs = int64(o.interval)
	}
	if _, _, err := agent.Planned(s); err != nil {
		return err
	}
	if o.record != "" && !o.foreground {
		return usageError("--record wants --foreground")
	}
	if o.foreground {
		return a.attachHere(c, o, s, pid)
	}
	d, err := a.daemon(c.Context())
	if err == nil {
		return errors.Join(a.handOver(c.Context(), d, s, pid), d.conn.Close())
	}
	if a.asked() != "" || !problem.Is(err, problem.NoDaemon) {
		return err
	}
	return a.attachHere(c, o, s, pid)
}

// handOver has the daemon protect a VM.
func (a *app) handOver(ctx context.Context, d *protector, s *apipb.Spec, pid int) error {
	stream, err := d.Attach(ctx, &apipb.AttachRequest{QemuPid: int32(pid), Spec: s})
	if err != nil {
		return api.FromStatus("attach", err)
	}
	for {
		e, err := stream.Recv()
		if err != nil {
			return api.FromStatus("attach", err)
		}
		a.log.Debug(e.GetStep(), "qemu_pid", pid)
		p := e.GetProtected()
		if p == nil {
			continue
		}
		if a.json {
			v := viewStatus(p)
			v.Schema = schema("attach")
			a.print("attach", v)
			return nil
		}
		fmt.Fprintf(a.out, "VM %s (pid %d) is protected by the daemon, policy %s\n", p.GetVm(), pid, p.GetPolicy().GetName())
		return nil
	}
}

// attachHere protects a VM by this process.
func (a *app) attachHere(c *cobra.Command, o *attachOptions, s *apipb.Spec, pid int) (err error) {
	if s.GetOnDeath() == controller.Restore.String() || s.GetRehearseEveryNs() != 0 {
		return problem.New(problem.NoDaemon, "attach", fmt.Sprintf("pid %d", pid), "--on-death restore and --rehearse-every are the daemon's").WithHint("start one: ckagent daemon")
	}
	ao, p, err := a.plan(s)
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
	trial := newTrial(c.Context(), proving.New(nil).Apart, a.log)
	defer trial.end()
	p.Slot = slot
	p.Taken = func(r *capture.Result) {
		a.printCheckpoint(r)
		trial.after(r)
	}
	p.Failed = func(err error) { a.log.Error("checkpoint failed", "code", problem.CodeOf(err), "error", err) }
	p.Decided = a.decided
	if o.record != "" {
		r, rerr := recordAsking(o.record)
		if rerr != nil {
			return rerr
		}
		defer func() { err = errors.Join(err, r.close()) }()
		p.Asked = r.asked
	}
	protector := v.Protect(st, p)
	if name := o.wanted(c, registry); name != "" {
		if _, err := protector.SetPolicy(c.Context(), name, s.GetParams()); err != nil {
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
