package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// daemon is the one that is measured.
type daemon struct{ *server }

func startDaemon(ctx context.Context, path, level string) (*daemon, error) {
	log, err := os.CreateTemp("", "cgmanager-bench-log-")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if err := os.Remove(log.Name()); err != nil {
		return nil, err
	}
	// The client is let in by a rule: nobody else is asked. Its bounds are out of the way.
	const rule = "[[rule]]\nuid = 0\n"
	const unlimited = "1000000000"
	var ruleErr error
	s, err := startServer(ctx, log, func(dir, sock string) []string {
		rules := filepath.Join(dir, "realtime.toml")
		ruleErr = os.WriteFile(rules, []byte(rule), 0o600)
		return []string{
			path, "--listen", "unix:path=" + sock, "--state-dir", filepath.Join(dir, "state"), "--log-level", level,
			"--realtime-policy", rules, "--actions-per-burst-max", unlimited,
			"--processes-per-user-max", unlimited, "--threads-per-user-max", unlimited,
		}
	})
	if err := errors.Join(err, ruleErr); err != nil {
		return nil, err
	}
	return &daemon{s}, nil
}

// cpuTime returns the processor time that the threads of processes have used.
func cpuTime(pids ...int) (sum time.Duration, err error) {
	for _, pid := range pids {
		if err := threads(pid, func(dir string) error {
			b, err := os.ReadFile(filepath.Join(dir, "schedstat"))
			if err != nil {
				return err
			}
			first, _, _ := strings.Cut(string(b), " ")
			ns, err := strconv.ParseInt(first, 10, 64)
			sum += time.Duration(ns)
			return err
		}); err != nil {
			return 0, err
		}
	}
	return sum, nil
}

func threads(pid int, f func(dir string) error) error {
	task := filepath.Join("/proc", strconv.Itoa(pid), "task")
	tids, err := os.ReadDir(task)
	if err != nil {
		return err
	}
	for _, t := range tids {
		if err := f(filepath.Join(task, t.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// status sums the numbers of some lines of a file like /proc/PID/status.
func status(path string, keys ...string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var sum int64
	found := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		k, v, _ := strings.Cut(s.Text(), ":")
		for _, key := range keys {
			if k == key {
				n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
				if err != nil {
					return 0, err
				}
				sum += n
				found++
			}
		}
	}
	if found != len(keys) {
		return 0, fmt.Errorf("%s: not all of %v in it", path, keys)
	}
	return sum, nil
}

// rss returns the resident set in bytes.
func (s *server) rss() (int64, error) {
	kb, err := status(filepath.Join("/proc", strconv.Itoa(s.pid()), "status"), "VmRSS")
	return kb << 10, err
}

// switches returns how often the threads of processes have gone to sleep so far, which
// is how often they were woken up. To be preempted is no wake-up.
func switches(pids ...int) (sum int64, err error) {
	for _, pid := range pids {
		if err := threads(pid, func(dir string) error {
			n, err := status(filepath.Join(dir, "status"), "voluntary_ctxt_switches")
			sum += n
			return err
		}); err != nil {
			return 0, err
		}
	}
	return sum, nil
}
