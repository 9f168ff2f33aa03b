package test

import (
	"reflect"
	"strings"
	"testing"

	"cgmanager/api"
	"cgmanager/privcheck/matrix"
)

// TestMatrixHasEveryMethod: whatever either interface offers about a cgroup or
// a task is in the matrix of privileges, for every requestor and every cgroup.
func TestMatrixHasEveryMethod(t *testing.T) {
	asked := map[string]int{}
	for _, row := range matrix.Rows() {
		asked[row.Interface+"."+row.Method+" "+row.Requestor+" "+row.Cgroup]++
	}
	want := map[string]bool{}
	one := reflect.TypeFor[api.CGManager1]()
	for m := range one.Methods() {
		if m.Name == "ActFor" || m.Name == "ListGrants" {
			continue // about no cgroup, and no task
		}
		want["CGManager1."+m.Name] = true
	}
	zero := reflect.TypeFor[api.CGManager0]()
	for m := range zero.Methods() {
		name := strings.TrimSuffix(m.Name, "0")
		if name == "ListControllers" {
			continue // about no cgroup, and without an Scm form
		}
		want["cgmanager0_0."+name] = true
		want["cgmanager0_0."+name+"Scm"] = true
	}
	if len(want) != 13+4+2*16 {
		t.Errorf("%d methods; if that is right, correct this test", len(want))
	}
	for method := range want {
		for _, who := range matrix.Requestors() {
			for _, cgroup := range matrix.Names() {
				if asked[method+" "+who.Name+" "+cgroup] == 0 {
					t.Errorf("no row for %s by %s about %s", method, who.Name, cgroup)
				}
			}
		}
	}
}
