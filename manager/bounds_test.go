package manager_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cgmanager/api"
	"cgmanager/cgfs/cgtest"
)

// What one request makes the daemon hold is bounded, however many keys fit into
// a message.
func TestKernelManyKeys(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	if _, err := m.Create(rq, n, []string{"memory", "devices"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := m.GetValue(rq, n, slices.Repeat([]string{"devices.list"}, 5000)); kind(err) != api.Limit {
		t.Errorf("GetValue of 5000 keys: %v, want a refusal", err)
	}
	values := map[string]string{}
	for i := range 3000 {
		values[fmt.Sprintf("devices.k%d", i)] = "a"
	}
	if err := m.SetValue(rq, n, values); kind(err) != api.Limit {
		t.Errorf("SetValue of 3000 keys: %v, want a refusal", err)
	}
	rules := strings.TrimSuffix(strings.Repeat("c 1:3 r,", 256), ",")
	err := m.SetValue(rq, n, map[string]string{"devices_whitelist": rules, "devices_blacklist": rules, "devices.deny": "c 1:3 r"})
	if kind(err) != api.Limit {
		t.Errorf("SetValue of 513 writes: %v, want a refusal", err)
	}
}

// Each level of a walk holds a descriptor.
func TestKernelDeepTree(t *testing.T) {
	cgtest.Require(t, cgtest.Root)
	m := newManager(t)
	rq := self(t, m)
	n := name(t)
	dir := filepath.Join(cgtest.Own(t, "freezer"), n)
	for range 140 {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(dir, "x")
	}
	if _, err := m.GetTasksRecursive0(rq, "freezer", n); kind(err) != api.Limit {
		t.Errorf("GetTasksRecursive: %v, want a refusal", err)
	}
}
