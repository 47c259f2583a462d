package main

import (
	"fmt"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker in release builds.
var version = "devel"

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: exactArgs(0, "no argument"),
		RunE: func(*cobra.Command, []string) error {
			goVersion := ""
			if b, ok := debug.ReadBuildInfo(); ok {
				goVersion = b.GoVersion
			}
			if a.json {
				a.print("version", struct {
					Schema  string `json:"schema"`
					Version string `json:"version"`
					Go      string `json:"go"`
				}{schema("version"), version, goVersion})
				return nil
			}
			fmt.Fprintf(a.out, "ckagent %s (%s)\n", version, goVersion)
			return nil
		},
	}
}
