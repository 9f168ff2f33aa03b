// Package systemd asks the host's systemd for scopes. It is used only on hosts
// whose first process systemd is, and holds no connection between two requests.
package systemd

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"path"
	"strings"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// Running reports whether systemd is the first process of this host
// (sd_booted(3), and what that leaves open).
func Running() bool {
	st, err := os.Lstat("/run/systemd/system")
	if err != nil || !st.IsDir() {
		return false
	}
	name, err := os.ReadFile("/proc/1/comm")
	return err == nil && string(bytes.TrimSpace(name)) == "systemd"
}

// Scope is a transient scope that is to be started (systemd.scope(5)).
type Scope struct {
	// Name and Slice are names of units: "x.scope", "user-1000.slice".
	Name, Slice string
	Description string
	// PID is the process that it begins with.
	PID int32
	// Controllers are those of v1 that it is to have a cgroup in. On v2 it has
	// all that systemd gives away.
	Controllers []string
	// PartOf names a unit with which the scope is stopped; empty is none.
	PartOf string
}

// Start asks systemd for the scope, delegated, and waits until it is there or ctx
// has ended.
func Start(ctx context.Context, s Scope) error {
	// systemd's own socket, which only root may connect to: it needs no bus.
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	properties := []systemd.Property{
		property("Description", s.Description),
		property("Slice", s.Slice),
		property("PIDs", []uint32{uint32(s.PID)}),
		property("Delegate", true),
		// As for login sessions: the slice's limit binds.
		property("TasksMax", uint64(math.MaxUint64)),
		property("CollectMode", "inactive-or-failed"),
	}
	if len(s.Controllers) > 0 {
		properties = append(properties, property("DelegateControllers", s.Controllers))
	}
	if s.PartOf != "" {
		properties = append(properties, property("PartOf", []string{s.PartOf}))
	}
	done := make(chan string, 1)
	_, err = conn.StartTransientUnitContext(ctx, s.Name, "fail", properties, done)
	if err != nil {
		return fmt.Errorf("start %s: %w", s.Name, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("start %s: the job ended as %q", s.Name, result)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("start %s: %w", s.Name, ctx.Err())
	}
}

// AllDevices reports whether systemd lets the processes of the unit whose cgroup
// this is use all devices, as far as the unit itself goes. The v1 kernel does not
// show all the rules.
func AllDevices(ctx context.Context, cgroup string) (bool, error) {
	unit := path.Base(cgroup)
	if !IsUnit(unit) {
		return false, fmt.Errorf("%q: no unit's name", unit)
	}
	kind := strings.TrimPrefix(path.Ext(unit), ".")
	kind = strings.ToUpper(kind[:1]) + kind[1:]
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return false, fmt.Errorf("connect to systemd: %w", err)
	}
	defer conn.Close()
	all, err := conn.GetUnitTypePropertiesContext(ctx, unit, kind)
	if err != nil {
		return false, fmt.Errorf("properties of %s: %w", unit, err)
	}
	// Another cgroup may be called like it. And with the policy "auto" the list
	// counts as soon as there is something in it.
	list, ok := all["DeviceAllow"].([][]any)
	return ok && len(list) == 0 && all["DevicePolicy"] == "auto" && all["ControlGroup"] == cgroup, nil
}

func property(name string, value any) systemd.Property {
	return systemd.Property{Name: name, Value: dbus.MakeVariant(value)}
}

// unitChars are those of a unit's name (unit_name_is_valid of systemd), but for
// "@", which stands before an instance's name.
const unitChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\"

// maxUnitName is the most that a unit's name may have (UNIT_NAME_MAX).
const maxUnitName = 255

// IsUnit reports whether a cgroup's name is that of a unit that systemd makes
// cgroups for.
func IsUnit(name string) bool {
	for _, suffix := range []string{".slice", ".scope", ".service", ".socket", ".mount", ".swap"} {
		if stem, ok := strings.CutSuffix(name, suffix); ok {
			return stem != "" && len(name) <= maxUnitName && strings.Trim(stem, unitChars+"@") == ""
		}
	}
	return false
}
