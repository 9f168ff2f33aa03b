package api

import (
	"slices"
	"strings"
)

const introspectHead = `<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
"http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
`

// Introspect returns the introspection XML of the object at path, and false
// if there is no such object: there is one at each path of Interfaces, or at those
// of them that are given, and at every path above those (D-Bus specification,
// "Introspection Data Format").
func Introspect(path string, objects ...string) (string, bool) {
	var b strings.Builder
	if len(objects) == 0 {
		objects = []string{RealtimePath, ObjectPath} // sorted
	}
	b.WriteString(introspectHead)
	if slices.Contains(objects, path) {
		b.WriteString("<node name=\"" + path + "\">\n")
		for _, i := range Interfaces() {
			if i.Path == "" || i.Path == path {
				i.writeXML(&b)
			}
		}
		b.WriteString("</node>\n")
		return b.String(), true
	}
	if path == "" || path != "/" && strings.HasSuffix(path, "/") {
		return "", false
	}
	last := ""
	b.WriteString("<node>\n")
	for _, object := range objects {
		rest, ok := strings.CutPrefix(object, strings.TrimSuffix(path, "/")+"/")
		child, _, _ := strings.Cut(rest, "/")
		if ok && child != last {
			b.WriteString("  <node name=\"" + child + "\"/>\n")
			last = child
		}
	}
	b.WriteString("</node>\n")
	return b.String(), last != ""
}

func (i *Interface) writeXML(b *strings.Builder) {
	b.WriteString("  <interface name=\"" + i.Name + "\">\n")
	for _, m := range i.Methods {
		if m.Overload {
			continue
		}
		if len(m.In)+len(m.Out) == 0 {
			b.WriteString("    <method name=\"" + m.Name + "\"/>\n")
			continue
		}
		b.WriteString("    <method name=\"" + m.Name + "\">\n")
		writeArgs(b, m.In, "in")
		writeArgs(b, m.Out, "out")
		b.WriteString("    </method>\n")
	}
	for _, p := range i.Properties {
		b.WriteString("    <property name=\"" + p.Name + "\" type=\"" + p.Type + "\" access=\"read\"/>\n")
	}
	b.WriteString("  </interface>\n")
}

func writeArgs(b *strings.Builder, args []Arg, direction string) {
	for _, a := range args {
		b.WriteString("      <arg name=\"" + a.Name + "\" type=\"" + a.Type + "\" direction=\"" + direction + "\"/>\n")
	}
}
