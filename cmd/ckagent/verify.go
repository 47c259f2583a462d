package main

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore/overlay"
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
	volumes, err := checkVolumes(c.Context(), st, info.ID)
	if err != nil {
		return err
	}
	if a.json {
		a.print("verify", struct {
			Schema string `json:"schema"`
			checkpointView
			Verified bool `json:"verified"`
			Volumes  int  `json:"volumes"`
		}{schema("verify"), viewOf(info), true, volumes})
		return nil
	}
	fmt.Fprintf(a.out, "%s of VM %s is whole: %d pages, %s stored", info.ID, info.VM, info.Pages, sizeText(info.StoredBytes))
	if volumes > 0 {
		fmt.Fprintf(a.out, ", %d disk volumes", volumes)
	}
	fmt.Fprintln(a.out)
	return nil
}

// checkVolumes has qemu-img look at the volumes, whose content was compared with
// their checksums already: an image may be what was written and yet be no good.
func checkVolumes(ctx context.Context, st *store.Store, id string) (n int, err error) {
	img, err := st.OpenImage(ctx, id)
	if err != nil {
		return 0, err
	}
	defer img.Close()
	m := img.Manifest()
	names := m.VolumeNames()
	for _, name := range names {
		if err := overlay.CheckImage(ctx, filepath.Join(st.VolumeDir(m.VM), name)); err != nil {
			return 0, err
		}
	}
	return len(names), nil
}
