// SPDX-License-Identifier: Apache-2.0
// Where kernels wait: every place in their sources that a barrier, a wait or a fence is called from. One of them can be
// left out, so that tests can show that each is needed and would be missed.
#pragma once

#include <source_location>
#include <string>

namespace turbo::hostsim {

/// True if this call is to be left out. `what` is the function's name.
bool left_out(const char* what, const std::source_location& where);

/// The places that calls came from since the last call, one a line: "what file:line:column".
std::string take_sites();
/// Leaves out the calls from one of these from now on; "" for none.
void leave_out(const std::string& site);

}  // namespace turbo::hostsim
