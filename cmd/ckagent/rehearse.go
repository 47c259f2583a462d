package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore"
)

type rehearseOptions struct {
	store string
	watch time.Duration
}

func newRehearseCommand(a *app) *cobra.Command {
	var o rehearseOptions
	c := &cobra.Command{
		Use: "rehearse VM|ID", Short: "Restore a checkpoint apart from everything, and see whether it runs",
		Long: "Restore a VM's newest checkpoint that verifies, or the one named, as a clone without a network; read and\n" +
			"verify all of its memory; watch its guest run for a while; take everything away again. The VM itself, if it\n" +
			"runs, notices nothing. The daemon does this on a schedule (--rehearse-every).",
		Args: exactArgs(1, "a VM or a checkpoint"),
		RunE: func(c *cobra.Command, args []string) error { return runRehearse(c, a, &o, args[0]) },
	}
	storeFlag(c, &o.store)
	c.Flags().DurationVar(&o.watch, "for", 10*time.Second, "how long the guest has to run")
	return c
}

func runRehearse(c *cobra.Command, a *app, o *rehearseOptions, ref string) error {
	if o.watch < 0 || o.watch > time.Hour {
		return usageError("--for %v: want 0 to 1h", o.watch)
	}
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	ro, err := (&restoreOptions{lazy: true, disks: string(restore.DisksCheckpoint), clock: "guest"}).options(nil)
	if err != nil {
		return err
	}
	r, err := restore.Rehearse(c.Context(), st, ref, ro, o.watch)
	if err != nil {
		return err
	}
	for _, n := range r.Notes {
		a.log.Warn(n)
	}
	if a.json {
		a.print("rehearse", r)
		return nil
	}
	fmt.Fprintf(a.out, "%s of VM %s came up in %s, all of its %s verified after %s, and ran for %s\n", r.ID, r.VM,
		durationText(time.Duration(r.CommandToRunningNS)), sizeText(r.RAMBytes), durationText(time.Duration(r.DrainedNS)), durationText(time.Duration(r.RanNS)))
	return nil
}
