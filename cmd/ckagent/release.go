package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/guardian"
)

func newReleaseCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "release QEMU-PID", Short: "Let go of a VM by hand", Args: exactArgs(1, "the pid of a QEMU process"),
		Long: "Let go of a VM by hand: end our helpers, drop write protection, close what was left in QEMU,\n" +
			"and resume the VM if we had stopped it. It may be called at any time, and again.",
		RunE: func(c *cobra.Command, args []string) error {
			pid, err := parsePID(args[0])
			if err != nil {
				return err
			}
			r, err := guardian.Release(c.Context(), pid)
			if err != nil {
				return err
			}
			if a.json {
				a.print("release", r)
			} else {
				if r.Disks != nil && !r.Disks.Nothing() {
					fmt.Fprintf(a.out, "pid %d: disks: %s\n", r.QEMUPID, sweptText(*r.Disks))
				}
				fmt.Fprintf(a.out, "pid %d: resumed %v, descriptors closed %d, still armed %v, took %s\n",
					r.QEMUPID, r.Resumed, len(r.ClosedFDs), r.Armed, durationText(time.Duration(r.TookNS)))
			}
			return nil
		},
	}
}
