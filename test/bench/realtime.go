package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// realtimePriority is what is asked for: rtkit's highest.
const realtimePriority = 20

// watchdogName is the name of the watchdog's process.
const watchdogName = "cgm-watchdog"

// watched prints what the watchdog holds, and how often daemon and watchdog wake up
// together, with a grant to an idle thread.
func watched(ctx context.Context, o options, w io.Writer, d *daemon) error {
	if o.idle == 0 {
		return nil
	}
	vs, err := (&request{victim: true}).spawn(ctx, 1)
	if err != nil {
		return err
	}
	defer vs.end()
	grant := &request{calls: [][]byte{makeRealtime(vs[0].Pid)}}
	if _, err := (&load{conns: 1, path: d.path, request: grant}).run(ctx, nil, 0); err != nil {
		return err
	}
	dog, err := child(d.pid(), watchdogName)
	if err != nil {
		return err
	}
	idling, err := wakeUps(ctx, o.idle, d.pid(), dog)
	if err != nil {
		return err
	}
	kb, err := status(filepath.Join("/proc", strconv.Itoa(dog), "status"), "VmRSS")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "with a grant to an idle thread: %.1f wake-ups a minute of daemon and watchdog, RSS of the watchdog %.1f MB\n",
		idling, megabytes(kb<<10))
	return err
}

// child returns the process of a name that is a child of another.
func child(parent int, name string) (int, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// PID (NAME) STATE PPID …, proc_pid_stat(5).
		before, after, _ := strings.Cut(string(b), ") ")
		pid, rest, _ := strings.Cut(before, " (")
		if f := strings.Fields(after); rest == name && len(f) > 1 && f[1] == strconv.Itoa(parent) {
			return strconv.Atoi(pid)
		}
	}
	return 0, fmt.Errorf("process %d has no child %s", parent, name)
}
