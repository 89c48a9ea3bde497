// SPDX-License-Identifier: Apache-2.0
#include "sites.h"

#include <map>
#include <tuple>

namespace turbo::hostsim {
namespace {

// The file's name is one pointer for each translation unit.
using Key = std::tuple<const char*, const char*, uint32_t, uint32_t>;

struct Site {
  std::string name;
  bool called, left_out;
};

std::map<Key, Site>& sites() {
  static std::map<Key, Site> known;
  return known;
}

std::string& omitted() {
  static std::string name;
  return name;
}

std::string name_of(const char* what, const std::source_location& where) {
  const std::string path = where.file_name();
  return std::string(what) + " " + path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line()) + ":" +
         std::to_string(where.column());
}

}  // namespace

bool left_out(const char* what, const std::source_location& where) {
  const Key key{what, where.file_name(), where.line(), where.column()};
  auto found = sites().find(key);
  if (found == sites().end()) {
    const std::string name = name_of(what, where);
    found = sites().emplace(key, Site{name, false, name == omitted()}).first;
  }
  found->second.called = true;
  return found->second.left_out;
}

std::string take_sites() {
  std::string out;
  for (auto& [key, site] : sites()) {
    const bool listed = out.find(site.name + "\n") != std::string::npos;
    if (site.called && !listed) out += site.name + "\n";
    site.called = false;
  }
  return out;
}

void leave_out(const std::string& name) {
  omitted() = name;
  for (auto& [key, site] : sites()) site.left_out = site.name == name;
}

}  // namespace turbo::hostsim
