package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/store"
)

type gcOptions struct {
	store    string
	dryRun   bool
	force    bool
	keepLast int
}

func newGCCommand(a *app) *cobra.Command {
	var o gcOptions
	c := &cobra.Command{
		Use: "gc", Short: "Remove what was never finished, and checkpoints beyond --keep-last", Args: exactArgs(0, "no argument"),
		RunE: func(c *cobra.Command, _ []string) error { return runGC(c, a, o) },
	}
	storeFlag(c, &o.store)
	c.Flags().BoolVar(&o.dryRun, "dry-run", false, "only say what would be removed (unfinished ones)")
	c.Flags().BoolVar(&o.force, "force", false, "also what another host claims; only if that host is gone")
	c.Flags().IntVar(&o.keepLast, "keep-last", 0, "keep this many good checkpoints of each VM (0: all)")
	return c
}

type keptView struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

func keptViews(kept []store.Kept) []keptView {
	out := make([]keptView, 0, len(kept))
	for _, k := range kept {
		out = append(out, keptView(k))
	}
	return out
}

func runGC(c *cobra.Command, a *app, o gcOptions) error {
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	removed := []string{}
	var kept []store.Kept
	if o.keepLast != 0 {
		if o.dryRun {
			return usageError("--dry-run does not go with --keep-last")
		}
		list, err := st.List(c.Context())
		if err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, i := range list {
			if seen[i.VM] {
				continue
			}
			seen[i.VM] = true
			rep, err := st.ApplyRetention(c.Context(), i.VM, o.keepLast)
			if err != nil {
				return err
			}
			removed, kept = append(removed, rep.Removed...), append(kept, rep.Kept...)
		}
	}
	rep, err := st.GC(c.Context(), store.GCOptions{DryRun: o.dryRun, Force: o.force})
	if err != nil {
		return err
	}
	removed, kept = append(removed, rep.Removed...), append(kept, rep.Kept...)
	if a.json {
		a.print("gc", struct {
			Schema     string     `json:"schema"`
			Removed    []string   `json:"removed"`
			Kept       []keptView `json:"kept"`
			FreedBytes uint64     `json:"freed_bytes"`
			DryRun     bool       `json:"dry_run"`
		}{schema("gc"), removed, keptViews(kept), rep.FreedBytes, o.dryRun})
		return nil
	}
	verb := "removed"
	if o.dryRun {
		verb = "would remove"
	}
	for _, r := range removed {
		fmt.Fprintf(a.out, "%s %s\n", verb, r)
	}
	for _, k := range kept {
		fmt.Fprintf(a.out, "kept %s: %s\n", k.ID, k.Reason)
	}
	fmt.Fprintf(a.out, "%s %d, %s of unfinished ones\n", verb, len(removed), sizeText(rep.FreedBytes))
	return nil
}
