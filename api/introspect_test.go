package api_test

import (
	"encoding/xml"
	"slices"
	"strings"
	"testing"

	"cgmanager/api"
)

func TestIntrospect(t *testing.T) {
	type node struct {
		Name       string `xml:"name,attr"`
		Interfaces []struct {
			Name    string `xml:"name,attr"`
			Methods []struct {
				Name string `xml:"name,attr"`
				Args []struct {
					Type      string `xml:"type,attr"`
					Direction string `xml:"direction,attr"`
				} `xml:"arg"`
			} `xml:"method"`
			Properties []struct {
				Type string `xml:"type,attr"`
			} `xml:"property"`
		} `xml:"interface"`
		Nodes []struct {
			Name string `xml:"name,attr"`
		} `xml:"node"`
	}
	text, ok := api.Introspect(api.ObjectPath)
	var n node
	if err := xml.Unmarshal([]byte(text), &n); err != nil || !ok {
		t.Fatalf("%v, %v", ok, err)
	}
	if len(n.Interfaces) != 5 || n.Name != api.ObjectPath {
		t.Errorf("node %q with %d interfaces", n.Name, len(n.Interfaces))
	}
	// Every *Scm method takes a socket last and answers on it alone, and
	// there is a method that it is the other form of.
	scm := 0
	names := map[string]bool{}
	for _, m := range n.Interfaces[0].Methods {
		if names[m.Name] {
			t.Errorf("%s twice: bindings know one signature a name", m.Name)
		}
		names[m.Name] = true
		if plain, ok := strings.CutSuffix(m.Name, "Scm"); ok {
			scm++
			if last := m.Args[len(m.Args)-1]; !names[plain] || last.Type != "h" || last.Direction != "in" {
				t.Errorf("%s: %+v", m.Name, m.Args)
			}
		}
	}
	if scm != 16 {
		t.Errorf("%d methods with a side channel", scm)
	}
	// From the root down to the objects, one step at a time.
	var found []string
	for paths := []string{"/"}; len(paths) > 0; paths = paths[1:] {
		path := paths[0]
		text, ok := api.Introspect(path)
		n = node{}
		if err := xml.Unmarshal([]byte(text), &n); err != nil || !ok {
			t.Fatalf("%s: %v, %v, %+v", path, ok, err, n)
		}
		if len(n.Interfaces) > 0 {
			found = append(found, path)
		}
		for _, below := range n.Nodes {
			paths = append(paths, strings.TrimSuffix(path, "/")+"/"+below.Name)
		}
	}
	if !slices.Equal(found, []string{api.RealtimePath, api.ObjectPath}) {
		t.Errorf("objects %q", found)
	}
	text, _ = api.Introspect(api.RealtimePath)
	n = node{}
	if err := xml.Unmarshal([]byte(text), &n); err != nil {
		t.Fatal(err)
	}
	if len(n.Interfaces) != 4 || n.Interfaces[0].Name != api.RealtimeInterface || len(n.Interfaces[0].Methods) != 7 ||
		len(n.Interfaces[0].Properties) != 3 || n.Interfaces[0].Properties[0].Type != "x" {
		t.Errorf("%s: %+v", api.RealtimePath, n)
	}
	for _, path := range []string{"", "/or", "/org/", "/org/linuxcontainers/", "//", "/no/such", api.ObjectPath + "/x", api.ObjectPath + "/"} {
		if _, ok := api.Introspect(path); ok {
			t.Errorf("%q is an object", path)
		}
	}
}
