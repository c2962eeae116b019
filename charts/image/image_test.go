package image_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/sheaf-project/sheaf/charts/image"
)

// program writes the source of a small command into a new folder.
func program(t *testing.T, dir string) image.Command {
	t.Helper()
	for name, text := range map[string]string{
		"go.mod":  "module example.com/small\n\ngo 1.26.0\n",
		"main.go": "package main\n\nfunc main() { println(\"small\") }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return image.Command{Dir: dir, Package: ".", Name: "small", Args: []string{"-x"}, Env: map[string]string{"b": "2", "a": "1"}, Version: "v9", Ports: []int{8080}}
}

func build(t *testing.T, c image.Command) v1.ImageIndex {
	t.Helper()
	index, err := image.Build(t.Context(), c, image.Platforms())
	if err != nil {
		t.Fatal(err)
	}
	return index
}

func images(t *testing.T, index v1.ImageIndex) map[string]v1.Image {
	t.Helper()
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]v1.Image{}
	for _, d := range m.Manifests {
		img, err := index.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		all[d.Platform.String()] = img
	}
	return all
}

// TestBuild: an image for each platform, of nobody's, with nothing but the
// binary, certificates and /tmp.
func TestBuild(t *testing.T) {
	index := build(t, program(t, t.TempDir()))
	all := images(t, index)
	if len(all) != 2 {
		t.Errorf("%d images", len(all))
	}
	for _, p := range []string{"linux/amd64", "linux/arm64"} {
		img := all[p]
		if img == nil {
			t.Fatalf("there is no image for %s", p)
		}
		cf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		c := cf.Config
		if cf.OS+"/"+cf.Architecture != p || c.User != "65532:65532" || !slices.Equal(c.Entrypoint, []string{"/small"}) || !slices.Equal(c.Cmd, []string{"-x"}) ||
			!slices.Equal(c.Env, []string{"a=1", "b=2"}) || c.Labels["org.opencontainers.image.version"] != "v9" || len(c.ExposedPorts) != 1 || cf.Created.Unix() != 0 {
			t.Errorf("%s: config is %+v", p, cf)
		}
		files := tar.NewReader(mutate.Extract(img))
		var names []string
		for {
			h, err := files.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, h.Name)
			body, err := io.ReadAll(files)
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case h.ModTime.Unix() != 0 || h.Uid != 0 || h.Uname != "":
				t.Errorf("%s: %s tells who or when: %+v", p, h.Name, h)
			case h.Name == "small" && (h.Mode != 0o755 || !bytes.HasPrefix(body, []byte("\x7fELF")) || bytes.Contains(body, []byte(os.TempDir()+"/"))):
				t.Errorf("%s: the binary is none, or holds a path of this machine", p)
			case strings.HasSuffix(h.Name, ".crt") && bytes.Count(body, []byte("BEGIN CERTIFICATE")) < 100:
				t.Errorf("%s: few certificates", p)
			case h.Name == "tmp" && h.Mode != 0o1777:
				t.Errorf("%s: /tmp has mode %o", p, h.Mode)
			}
		}
		slices.Sort(names)
		want := []string{"etc", "etc/ssl", "etc/ssl/certs", "etc/ssl/certs/ca-certificates.crt", "small", "tmp"}
		for i := range names {
			names[i] = strings.TrimSuffix(names[i], "/")
		}
		if !slices.Equal(names, want) {
			t.Errorf("%s: files are %q, want %q", p, names, want)
		}
	}
}

// TestSame: the same source gives the same image, wherever it lies.
func TestSame(t *testing.T) {
	first, err := build(t, program(t, t.TempDir())).Digest()
	if err != nil {
		t.Fatal(err)
	}
	c := program(t, t.TempDir())
	second, err := build(t, c).Digest()
	if err != nil {
		t.Fatal(err)
	}
	if first != second {
		t.Errorf("two images of one source: %s and %s", first, second)
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "main.go"), []byte("package main\n\nfunc main() { println(\"other\") }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if third, err := build(t, c).Digest(); err != nil || third == first {
		t.Errorf("another source, the same image %s (%v)", third, err)
	}
}

// TestSave: the archive is the layout, under a name that a node finds.
func TestSave(t *testing.T) {
	index := build(t, program(t, t.TempDir()))
	dir := filepath.Join(t.TempDir(), "small")
	if err := image.Save(index, dir, "localhost/me/small:v9"); err != nil {
		t.Fatal(err)
	}
	stored, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(stored); err != nil {
		t.Error(err)
	}
	f, err := os.Open(dir + ".tar")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := map[string][]byte{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	var top v1.IndexManifest
	if err := json.Unmarshal(files["index.json"], &top); err != nil || len(top.Manifests) != 1 {
		t.Fatalf("index.json: %v %s", err, files["index.json"])
	}
	d := top.Manifests[0]
	if want, _ := index.Digest(); d.Digest != want || d.Annotations["io.containerd.image.name"] != "localhost/me/small:v9" || d.Annotations["org.opencontainers.image.ref.name"] != "v9" {
		t.Errorf("index.json names %s %v", d.Digest, d.Annotations)
	}
	if files["blobs/sha256/"+d.Digest.Hex] == nil || files["oci-layout"] == nil {
		t.Error("the archive lacks what its index names")
	}
	for _, bad := range []string{"", "me/Small", "localhost/small@sha256:" + strings.Repeat("0", 64)} {
		if err := image.Save(index, dir, bad); err == nil {
			t.Errorf("%q was taken for a name", bad)
		}
	}
}

func TestBuildFails(t *testing.T) {
	c := program(t, t.TempDir())
	c.Package = "./nothing"
	if _, err := image.Build(t.Context(), c, image.Platforms()); err == nil || !strings.Contains(err.Error(), "./nothing") {
		t.Errorf("got %v", err)
	}
	if _, err := image.Build(t.Context(), c, nil); err == nil {
		t.Error("an image for no platform")
	}
}
