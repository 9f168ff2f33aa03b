package main

import (
	"strings"
	"testing"

	"cgmanager/cmd/service"
	"cgmanager/test/harness"
)

// Misuse is found before anything is done, and told with the argument as it was typed.
func TestMisuse(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"start"}, `unexpected argument: "start"`},
		{[]string{"--nosuch"}, "unknown flag: --nosuch"},
		{[]string{"--log-level", "loud"}, `--log-level "loud": error, warning, info or debug`},
		{[]string{"--lower", "sock"}, `--lower: "sock": not an address of the form unix:path=/PATH`},
		{[]string{"--listen", "sock"}, `--listen: "sock": not an address of the form unix:path=/PATH`},
		{[]string{"--lower", "/a/sock", "--listen", "unix:path=/a/sock"}, "--listen unix:path=/a/sock: that is where the daemon to ask is (--lower)"},
		{[]string{"--wait", "2m"}, "--wait 2m0s: must be 0 to 1m"},
		{[]string{"--pidfile", "pid"}, "--pidfile pid: must be an absolute path"},
	} {
		var out, errs strings.Builder
		code := run(c.args, &out, &errs)
		if want := "cgproxy: " + c.want + "\nhint: cgproxy --help lists the flags\n"; code != service.ExitUsage || errs.String() != want || out.Len() > 0 {
			t.Errorf("%q: %d, %q, want %d, %q", c.args, code, errs.String(), service.ExitUsage, want)
		}
	}
}

// TestHelpAndMan: --help and the man page have the same flags.
func TestHelpAndMan(t *testing.T) {
	var help, errs strings.Builder
	if code := run([]string{"--help"}, &help, &errs); code != service.ExitOK || errs.Len() > 0 {
		t.Fatalf("%d, %q", code, errs.String())
	}
	harness.SameFlags(t, help.String(), "testdata/cgproxy.8.md")
}
