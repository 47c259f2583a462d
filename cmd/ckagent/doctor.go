package main

import (
	"github.com/spf13/cobra"

	"github.com/ckagent/ckagent/agent/doctor"
)

type doctorOptions struct {
	store string
	qemu  []string
}

func newDoctorCommand(a *app) *cobra.Command {
	var o doctorOptions
	c := &cobra.Command{
		Use: "doctor", Short: "Tell what this host offers, what is missing, and how to mend it", Args: exactArgs(0, "no argument"),
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := doctor.Run(c.Context(), doctor.Options{StoreDir: o.store, QEMU: o.qemu})
			if err != nil {
				return err
			}
			if a.json {
				a.print("doctor", r)
				return nil
			}
			return r.WriteText(a.out)
		},
	}
	storeFlag(c, &o.store)
	c.Flags().StringSliceVar(&o.qemu, "qemu", nil, "further QEMU binaries to look at")
	return c
}
