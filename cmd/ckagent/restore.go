package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/selfexe"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore"
	"github.com/ckagent/ckagent/restore/plan"
)

type restoreOptions struct {
	store      string
	qmp        string
	maps       []string
	secrets    []string
	binary     string
	lazy       bool
	eager      bool
	detach     bool
	clone      bool
	assumeDead bool
	paused     bool
	dryRun     bool
	disks      string
	diskDir    string
	flatten    bool
	forceCPU   bool
	clock      string
	rate       sizeValue

	all              bool // VMs that a daemon protected
	config, stateDir string
}

func newRestoreCommand(a *app) *cobra.Command {
	var o restoreOptions
	c := &cobra.Command{
		Use:   "restore ID|VM|--all [-- QEMU-ARGUMENTS]",
		Short: "Bring a VM back from a checkpoint",
		Long: "Bring a VM back from a checkpoint. The guest runs at once and its memory is paged in on demand;\n" +
			"the command ends when everything is in (with --detach: when the guest runs). A VM's name stands\n" +
			"for its newest checkpoint that verifies. Arguments after -- are added to QEMU's.",
		RunE: func(c *cobra.Command, args []string) error { return runRestore(c, a, &o, args) },
	}
	storeFlag(c, &o.store)
	f := c.Flags()
	f.StringVar(&o.qmp, "qmp", "", "path of the restored VM's QMP socket (default: in its run directory)")
	f.StringArrayVar(&o.maps, "map", nil, "OLD=NEW: another path, socket, port or interface instead of a recorded one")
	f.StringArrayVar(&o.secrets, "secret", nil, "ID=FILE: where the secret object ID, which is not recorded, is now")
	f.StringVar(&o.binary, "qemu", "", "another QEMU binary than the recorded one")
	f.BoolVar(&o.lazy, "lazy", true, "run at once and page in on demand")
	f.BoolVar(&o.eager, "eager", false, "bring all memory in before the guest runs")
	f.BoolVar(&o.detach, "detach", false, "end when the guest runs; the paging goes on")
	f.BoolVar(&o.clone, "clone", false, "make a second VM: new name, UUID and MACs, no network unless mapped")
	f.BoolVar(&o.assumeDead, "assume-dead", false, "restore although the original may be alive; only if you know that it is not")
	f.BoolVar(&o.paused, "paused", false, "leave the guest paused")
	f.BoolVar(&o.forceCPU, "force-cpu", false, "restore although the CPU lacks what the guest uses")
	f.StringVar(&o.clock, "clock", "guest", "guest: its clock goes on where it was; host: it is set to the host's")
	f.BoolVar(&o.dryRun, "dry-run", false, "print the command line and what was changed in it, and do nothing")
	f.StringVar(&o.disks, "disks", string(restore.DisksCheckpoint), "checkpoint: the disks as they were then, in new files; original: the original images, if nobody wrote to them since; as-is: whatever they hold now")
	f.StringVar(&o.diskDir, "disk-dir", "", "where to make the disks (default: a new directory below "+restore.DiskRoot+")")
	f.BoolVar(&o.flatten, "disks-flatten", false, "copy the disks out of the store in the background, so that they need it no longer")
	f.BoolVar(&o.all, "all", false, "every VM that a daemon protected and that is gone, such as after the host's boot; not those ended on purpose")
	f.StringVar(&o.config, "config", "", "with --all: the daemon's configuration")
	f.StringVar(&o.stateDir, "state-dir", "", "with --all: where the daemon keeps what it protects")
	f.Var(&o.rate, "bandwidth", "limit of the background paging and flattening, bytes per second")
	return c
}

// splitArgs separates what a verb is about from QEMU's arguments after "--".
func splitArgs(c *cobra.Command, args []string, what string) (ref string, extra []string, err error) {
	n := len(args)
	if at := c.ArgsLenAtDash(); at >= 0 {
		n, extra = at, args[at:]
	}
	if n != 1 {
		return "", nil, usageError("want %s, got %d arguments", what, n)
	}
	return args[0], extra, nil
}

func (o *restoreOptions) options(extra []string) (restore.Options, error) {
	r := restore.Options{Extra: extra, Eager: o.eager || !o.lazy, Detach: o.detach,
		Clone: o.clone, AssumeDead: o.assumeDead, Paused: o.paused, BytesPerSecond: uint64(o.rate),
		ForceCPU: o.forceCPU, HostClock: o.clock == "host", Secrets: map[string]string{}, FlattenDisks: o.flatten}
	if o.clock != "guest" && o.clock != "host" {
		return r, usageError("--clock %q: want guest or host", o.clock)
	}
	var err error
	if r.Disks, err = restore.ParseDiskMode(o.disks); err != nil {
		return r, err
	}
	if o.diskDir != "" {
		if r.DiskDir, err = filepath.Abs(o.diskDir); err != nil {
			return r, usageError("--disk-dir %q: %w", o.diskDir, err)
		}
	}
	// QEMU, which runs in another directory, and whoever is told of these must find them.
	if o.qmp != "" {
		r.QMPPath = absolute(o.qmp)
	}
	if o.binary != "" {
		r.Binary = absolute(o.binary)
	}
	for _, m := range o.maps {
		mapping, err := plan.ParseMapping(m)
		if err != nil {
			return r, err
		}
		r.Map = append(r.Map, mapping)
	}
	for _, s := range o.secrets {
		id, file, ok := strings.Cut(s, "=")
		if !ok || id == "" || file == "" {
			return r, usageError("--secret %q: want ID=FILE", s)
		}
		r.Secrets[id] = absolute(file)
	}
	r.Self = selfexe.Path()
	return r, nil
}

func runRestore(c *cobra.Command, a *app, o *restoreOptions, args []string) error {
	if o.all {
		if len(args) > 0 || o.clone || o.qmp != "" || o.dryRun {
			return usageError("--all stands alone: it takes no VM, --clone, --qmp or --dry-run")
		}
		return runRestoreAll(c, a, o)
	}
	ref, extra, err := splitArgs(c, args, "a checkpoint or a VM")
	if err != nil {
		return err
	}
	ro, err := o.options(extra)
	if err != nil {
		return err
	}
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	if o.dryRun {
		return runRestoreDry(c, a, st, ref, ro)
	}
	b := a.newBar("paging in")
	ro.OnPhase = func(p restore.Phase) { a.log.Debug("restore", "phase", p.Name, "at", time.Duration(p.AtNS)) }
	ro.OnDrain = func(p restore.Progress) {
		if !a.json {
			b.update(p.Bytes, p.TotalBytes)
		}
	}
	flat := a.newBar("flattening")
	ro.OnFlatten = func(done, total uint64) {
		if !a.json {
			flat.update(done, total)
		}
	}
	res, err := restore.Run(c.Context(), st, ref, ro)
	if res == nil {
		return err
	}
	for _, n := range res.Notes {
		a.log.Warn(n)
	}
	if err != nil {
		// The guest runs; what failed is the paging.
		return errors.Join(problem.New(problem.CodeOf(err), "restore", "VM "+res.VM, "the guest runs as pid %d, but: %w", res.QEMUPID, err))
	}
	if a.json {
		a.print("restore", res)
		return nil
	}
	fmt.Fprintf(a.out, "VM %s runs again from %s: pid %d, monitor %s\n", res.Name, res.ID, res.QEMUPID, res.QMP)
	for _, d := range res.Disks {
		fmt.Fprintf(a.out, "disk %s: %s", d.Name, d.Path)
		if d.Backing != "" {
			fmt.Fprintf(a.out, " over %s", d.Backing)
		}
		fmt.Fprintln(a.out)
	}
	fmt.Fprintf(a.out, "QEMU up after %s, guest running %s later (%s in all)", durationText(time.Duration(res.ReadyNS)),
		durationText(time.Duration(res.ResumeNS)), durationText(time.Duration(res.CommandToRunningNS)))
	if res.DrainedNS > 0 {
		fmt.Fprintf(a.out, ", everything in after %s with %d faults", durationText(time.Duration(res.DrainedNS)), res.Faults)
	}
	fmt.Fprintln(a.out)
	return nil
}

func runRestoreDry(c *cobra.Command, a *app, st *store.Store, ref string, ro restore.Options) error {
	sel, err := st.Get(c.Context(), ref, store.GetOptions{})
	if err != nil {
		return err
	}
	in, err := st.Inspect(c.Context(), sel.Info.ID)
	if err != nil {
		return err
	}
	p, err := restore.MakePlan(in.Manifest, ro)
	if err != nil {
		return err
	}
	if a.json {
		a.print("plan", struct {
			Schema string `json:"schema"`
			ID     string `json:"id"`
			*plan.Plan
		}{schema("plan"), sel.Info.ID, p})
		return nil
	}
	for _, ch := range p.Changes {
		fmt.Fprintf(a.err, "changed: %s: %s\n", ch.What, ch.Why)
	}
	fmt.Fprintf(a.out, "%s", shellQuote(p.Binary))
	for _, arg := range p.Args {
		fmt.Fprintf(a.out, " %s", shellQuote(arg))
	}
	fmt.Fprintln(a.out)
	return nil
}
