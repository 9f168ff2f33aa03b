package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// maxProxies is how many proxies are put in a row.
const maxProxies = 2

// startProxy starts a proxy that asks the daemon, or proxy, at lower.
func startProxy(ctx context.Context, path, level, lower string) (*server, error) {
	return startServer(ctx, os.Stderr, func(_, sock string) []string {
		return []string{path, "--lower", "unix:path=" + lower, "--listen", "unix:path=" + sock, "--log-level", level}
	})
}

// proxied returns what is measured through proxies: not what they answer
// themselves on a connection of its own, but what a tool does that is started for
// one request.
func proxied(cg *cgroup) []*request {
	rs := slices.DeleteFunc(requests(cg), func(r *request) bool { return r.reconnect })
	i := slices.IndexFunc(rs, func(r *request) bool { return r.name == "GetValue" })
	return append(rs, &request{name: "connect, log in, GetValue", calls: rs[i].calls, reconnect: true})
}

// proxyTable measures requests without a proxy, through one and through two, in
// turn, and prints what they cost all of them together.
func proxyTable(ctx context.Context, o options, w io.Writer, d *daemon, cg *cgroup) (err error) {
	doors := []*server{d.server}
	for range maxProxies {
		// Their log is for failures alone, and the daemon's has a line a change.
		p, err := startProxy(ctx, o.proxy, "warning", doors[len(doors)-1].path)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.stop()) }()
		doors = append(doors, p)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "\nrequest\tconnections\tproxies\trequests/s\tp50 µs\tratio\tp99 µs\tCPU µs\tratio\tRSS MB of the last\t")
	for _, r := range proxied(cg) {
		if !strings.Contains(strings.ToLower(r.name), strings.ToLower(o.only)) {
			continue
		}
		for _, conns := range o.conns {
			cells := make([]cell, len(doors))
			for range o.rounds {
				if err := cg.settle(); err != nil {
					return err
				}
				var pids []int
				for i, door := range doors {
					pids = append(pids, door.pid())
					if err := cells[i].load(ctx, o, r, conns, door.path, pids); err != nil {
						return fmt.Errorf("%s, %d connections, %d proxies: %w", r.name, conns, i, err)
					}
				}
			}
			for i, door := range doors {
				rss, err := door.rss()
				if err != nil {
					return err
				}
				p50, cpu := median(cells[i].p50), median(cells[i].cpu)
				fmt.Fprintf(tw, "%s\t%d\t%d\t%.0f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t\n", r.name, conns, i, median(cells[i].rate),
					p50, p50/median(cells[0].p50), median(cells[i].p99), cpu, cpu/median(cells[0].cpu), megabytes(rss))
			}
		}
	}
	return tw.Flush()
}
