package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/store"
)

type mergeOptions struct {
	store    string
	compress string
	sparse   bool
}

func newMergeCommand(a *app) *cobra.Command {
	var o mergeOptions
	c := &cobra.Command{
		Use: "merge ID|VM", Short: "Make a checkpoint independent of those it continues", Args: exactArgs(1, "a checkpoint or a VM"),
		Long: "Copy the pages that a checkpoint took over from others, so that it becomes a full one. It can be read and\n" +
			"restored meanwhile, and is whole at every instant.",
		RunE: func(c *cobra.Command, args []string) error { return runMerge(c, a, o, args[0]) },
	}
	storeFlag(c, &o.store)
	c.Flags().StringVar(&o.compress, "compress", "none", "none, s2 or zstd")
	c.Flags().BoolVar(&o.sparse, "sparse", false, "only the pages of segments that are mostly unused by now")
	return c
}

func runMerge(c *cobra.Command, a *app, o mergeOptions, ref string) error {
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	info, err := st.Merge(c.Context(), ref, store.MergeOptions{Compress: o.compress, Sparse: o.sparse})
	if err != nil {
		return err
	}
	if a.json {
		a.print("checkpoint", struct {
			Schema string `json:"schema"`
			checkpointView
		}{schema("merge"), viewOf(info)})
		return nil
	}
	fmt.Fprintf(a.out, "%s of VM %s: %s of its own, %s in segments of other checkpoints\n", info.ID, info.VM, sizeText(info.StoredBytes), sizeText(info.Inherited))
	return nil
}
