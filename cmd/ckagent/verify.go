package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/store"
)

type verifyOptions struct{ store string }

func newVerifyCommand(a *app) *cobra.Command {
	var o verifyOptions
	c := &cobra.Command{
		Use: "verify ID|VM", Short: "Read every byte of a checkpoint and check it", Args: exactArgs(1, "a checkpoint or a VM"),
		RunE: func(c *cobra.Command, args []string) error { return runVerify(c, a, o, args[0]) },
	}
	storeFlag(c, &o.store)
	return c
}

func runVerify(c *cobra.Command, a *app, o verifyOptions, ref string) error {
	st, err := store.Open(o.store)
	if err != nil {
		return err
	}
	info, err := st.Verify(c.Context(), ref, a.newBar("verify").update)
	if err != nil {
		return err
	}
	if a.json {
		a.print("verify", struct {
			Schema string `json:"schema"`
			checkpointView
			Verified bool `json:"verified"`
		}{schema("verify"), viewOf(info), true})
		return nil
	}
	fmt.Fprintf(a.out, "%s of VM %s is whole: %d pages, %s stored\n", info.ID, info.VM, info.Pages, sizeText(info.StoredBytes))
	return nil
}
