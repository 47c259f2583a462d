package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/store"
)

type rmOptions struct {
	store string
	force bool
}

func newRmCommand(a *app) *cobra.Command {
	var o rmOptions
	c := &cobra.Command{
		Use: "rm ID...", Short: "Delete checkpoints", Args: cobra.MinimumNArgs(1),
		Long: "Delete checkpoints. What is in use is never deleted; a pinned one, a VM's last good one and\n" +
			"what is claimed from another host only with --force.",
		RunE: func(c *cobra.Command, args []string) error { return runRm(c, a, o, args) },
	}
	c.Args = func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError("want the id of a checkpoint")
		}
		return nil
	}
	storeFlag(c, &o.store)
	c.Flags().BoolVar(&o.force, "force", false, "also a pinned one, or the last good one of its VM")
	return c
}

func runRm(c *cobra.Command, a *app, o rmOptions, ids []string) error {
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	removed := []checkpointView{}
	for _, id := range ids {
		info, rerr := st.Remove(c.Context(), id, o.force)
		if rerr != nil {
			err = rerr
			break
		}
		removed = append(removed, viewOf(info))
		if !a.json {
			fmt.Fprintf(a.out, "removed %s of VM %s\n", info.ID, info.VM)
		}
	}
	if a.json && err == nil {
		a.print("rm", struct {
			Schema  string           `json:"schema"`
			Removed []checkpointView `json:"removed"`
		}{schema("rm"), removed})
	}
	return err
}
